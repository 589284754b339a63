"""Gauss-Newton and Fisher against sums over examples built from per-example autograd."""

import pytest
import torch
from problems import classification, mlp
from torch import nn
from torch.nn import functional

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator
from hessianflow.interfaces import HessianFlowError


def small():
    return classification(mlp((5, 6, 4)), (5,), 23, 4)


def jacobians(problem):
    """[examples, classes, size], row by row."""
    parameters = list(problem.model.parameters())
    outputs = problem.model(problem.inputs)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in outputs.reshape(-1)
    ]
    return torch.stack(rows).view(*outputs.shape, -1), outputs.detach()


@pytest.mark.parametrize("microbatch_size", [None, 6])
def test_ggn_of_cross_entropy(microbatch_size):
    """The Hessian of cross-entropy by its logits is diag(p) - p p^T."""
    problem = small()
    jacobian, outputs = jacobians(problem)
    p = outputs.softmax(dim=1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / 23
    operator = GGNOperator(problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size)
    torch.testing.assert_close(operator.dense(), expected)


def test_ggn_of_a_linear_model_is_its_hessian():
    problem = classification(nn.Linear(5, 3).double(), (5,), 9, 3)
    arguments = (problem.model, problem.loss_fn, problem.pair)
    torch.testing.assert_close(GGNOperator(*arguments).dense(), HessianOperator(*arguments).dense())


def test_ggn_of_a_loss_without_curvature_is_zero():
    problem = small()
    operator = GGNOperator(problem.model, lambda o, t: o.mean(), problem.pair)
    assert operator.dense().abs().max() == 0


@pytest.mark.parametrize("loss_fn", [functional.cross_entropy, nn.CrossEntropyLoss(reduction="sum")])
@pytest.mark.parametrize("microbatch_size", [None, 6])
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(loss_fn, microbatch_size):
    problem = small()
    parameters, expected = list(problem.model.parameters()), 0
    for x, y in zip(problem.inputs, problem.targets, strict=True):
        loss = functional.cross_entropy(problem.model(x[None]), y[None])
        g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
        expected = expected + torch.outer(g, g) / 23
    operator = FisherOperator(problem.model, loss_fn, problem.pair, microbatch_size=microbatch_size)
    torch.testing.assert_close(operator.dense(), expected)


def test_sampled_fisher_is_an_unbiased_estimate_of_the_gauss_newton_matrix():
    """For cross-entropy the Fisher information is the Gauss-Newton matrix; the mean over 300 draws of the labels."""
    problem = small()
    arguments = (problem.model, problem.loss_fn, problem.pair)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = torch.stack([FisherOperator(*arguments, labels="model", seed=s) @ v for s in range(300)])
    errors = (products.mean(dim=0) - GGNOperator(*arguments) @ v) / (products.std(dim=0) / 300**0.5)
    assert errors.abs().max() < 5
    assert errors.square().mean() < 2


def test_sampled_labels_do_not_depend_on_the_split():
    problem = small()
    arguments = (problem.model, problem.loss_fn, problem.pair)
    whole, again, split = (
        FisherOperator(*arguments, labels="model", seed=3, microbatch_size=size).dense() for size in (None, None, 5)
    )
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    torch.testing.assert_close(whole, split)


def test_both_are_positive_semi_definite_and_select_parameters():
    problem = small()
    for kind in (GGNOperator, FisherOperator):
        full = kind(problem.model, problem.loss_fn, problem.pair).dense()
        assert torch.linalg.eigvalsh(full).min() > -1e-12
        part = kind(problem.model, problem.loss_fn, problem.pair, params="2").dense()
        torch.testing.assert_close(part, full[36:, 36:])


def test_what_cannot_be_split_is_refused():
    problem = small()
    batch = {"input": problem.inputs}
    with pytest.raises(HessianFlowError, match=r"GGNOperator needs pairs \(inputs, targets\), got a dict"):
        GGNOperator(problem.model, problem.loss_fn, batch) @ torch.ones(64, dtype=torch.float64)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem.model

        def forward(self, x):
            return self.body(x), x

    several = GGNOperator(Several(), problem.loss_fn, problem.pair, microbatch_size=None)
    with pytest.raises(HessianFlowError, match=r"needs a model that returns one tensor .*, got tuple"):
        several @ torch.ones(64, dtype=torch.float64)
    with pytest.raises(HessianFlowError, match="labels must be one of data, model, got 'true'"):
        FisherOperator(problem.model, problem.loss_fn, problem.pair, labels="true")
    regression = FisherOperator(
        problem.model, functional.mse_loss, (problem.inputs, problem.inputs[:, :4]), labels="model"
    )
    with pytest.raises(HessianFlowError, match=r"labels='model' needs outputs \[N, classes\] and class indices"):
        regression @ torch.ones(64, dtype=torch.float64)
