"""The input Hessian against the dense one of torch.autograd.functional, and closed forms."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial import InputHessian
from hessianflow.curvature import top_eigenpairs

D = torch.float64


def problem():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(3, 4, generator=generator, dtype=D), torch.tensor([0, 1, 2])


def test_products_equal_the_dense_hessian():
    """The dense one is built by torch from the summed loss, with double reverse passes of its
    own."""
    model, x, y = problem()
    operator = InputHessian(model, x, y)
    model.eval()
    dense = torch.autograd.functional.hessian(
        lambda z: cross_entropy(model(z), y, reduction="sum"), x
    ).reshape(12, 12)
    ours = torch.stack([operator.matvec(e) for e in torch.eye(12, dtype=D)], 1)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-11)
    blocks = ours.reshape(3, 4, 3, 4)
    assert all(not blocks[i, :, j].any() for i in range(3) for j in range(3) if i != j)
    top = top_eigenpairs(operator, k=1, which="LA", tol=1e-10, seed=0)
    torch.testing.assert_close(top.values[0], torch.linalg.eigvalsh(dense)[-1], rtol=1e-9, atol=0)
    assert (operator.size, operator.dtype, operator.device) == (12, D, torch.device("cpu"))


def test_logistic_regression_in_closed_form():
    """Two classes, logits (w.x, 0): the Hessian in x is p(1-p) w w^T with p the sigmoid."""
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=D)
    model = nn.Linear(2, 2, bias=False, dtype=D)
    model.weight.data.copy_(weight)
    x = torch.tensor([[0.3, 0.1]], dtype=D)
    p = torch.sigmoid(x[0] @ weight[0])
    v = torch.tensor([0.7, 0.2], dtype=D)
    expected = p * (1 - p) * weight[0] * (weight[0] @ v)
    torch.testing.assert_close(
        InputHessian(model, x, torch.tensor([0])).matvec(v), expected, rtol=0, atol=1e-14
    )


def test_model_is_as_found_and_a_linear_loss_has_no_curvature():
    model, x, y = problem()
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    InputHessian(model, x, y).matvec(torch.ones(12, dtype=D))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    linear = InputHessian(nn.Linear(4, 2, dtype=D), x, y, lambda outputs, targets: outputs.sum(1))
    assert not linear.matvec(torch.ones(12, dtype=D)).any()


def test_a_loss_without_the_input_is_refused():
    class Cut(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.detach())

    _, x, y = problem()
    with pytest.raises(ValueError, match="no input curvature to measure"):
        InputHessian(Cut(4, 3, dtype=D), x, y)
