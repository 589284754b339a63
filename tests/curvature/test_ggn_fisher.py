"""Gauss-Newton and Fisher against sums over examples built from per-example autograd."""

import pytest
import torch
from problems import classification, mlp
from torch import nn
from torch.nn import functional

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator, top_eigenpairs
from hessianflow.curvature.fisher import draws_by_content
from hessianflow.interfaces import HessianFlowError


def small():
    return classification(mlp((5, 6, 4)), (5,), 23, 4)


def jacobians(problem):
    """[examples, classes, size], row by row."""
    parameters = list(problem.model.parameters())
    outputs = problem.model(problem.inputs)
    rows = [
        torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)]
        )
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
    operator = GGNOperator(
        problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size
    )
    torch.testing.assert_close(operator.dense(), expected)


def test_ggn_of_a_linear_model_is_its_hessian():
    problem = classification(nn.Linear(5, 3).double(), (5,), 9, 3)
    arguments = (problem.model, problem.loss_fn, problem.pair)
    torch.testing.assert_close(GGNOperator(*arguments).dense(), HessianOperator(*arguments).dense())


def test_ggn_of_a_loss_without_curvature_is_zero():
    problem = small()
    operator = GGNOperator(problem.model, lambda o, t: o.mean(), problem.pair)
    assert operator.dense().abs().max() == 0


@pytest.mark.parametrize(
    "loss_fn", [functional.cross_entropy, nn.CrossEntropyLoss(reduction="sum")]
)
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
    """For cross-entropy the Fisher information is the Gauss-Newton matrix; the mean over 300 draws
    of the labels."""
    problem = small()
    arguments = (problem.model, problem.loss_fn, problem.pair)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = torch.stack(
        [FisherOperator(*arguments, labels="model", seed=s) @ v for s in range(300)]
    )
    errors = (products.mean(dim=0) - GGNOperator(*arguments) @ v) / (products.std(dim=0) / 300**0.5)
    assert errors.abs().max() < 5
    assert errors.square().mean() < 2


def test_sampled_labels_do_not_depend_on_the_split():
    problem = small()
    arguments = (problem.model, problem.loss_fn, problem.pair)
    whole, again, split = (
        FisherOperator(*arguments, labels="model", seed=3, microbatch_size=size).dense()
        for size in (None, None, 5)
    )
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    torch.testing.assert_close(whole, split)


class Shuffled:
    """In another order, and in other parts, in every pass."""

    def __init__(self, problem, sizes):
        self.problem, self.sizes = problem, sizes

    def __iter__(self):
        order = torch.randperm(23)
        yield from zip(
            self.problem.inputs[order].split(self.sizes),
            self.problem.targets[order].split(self.sizes),
            strict=True,
        )


@pytest.mark.parametrize("sizes", [[23], [8, 8, 7], [1] * 23], ids=len)
def test_sampled_labels_do_not_depend_on_the_order(sizes):
    """The first product differed from later ones by 46 %, and again after the user drew a
    number."""
    problem = small()
    operator = FisherOperator(
        problem.model, problem.loss_fn, Shuffled(problem, sizes), labels="model", seed=3
    )
    v = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (
        FisherOperator(problem.model, problem.loss_fn, problem.pair, labels="model", seed=3) @ v
    )
    for _ in range(3):
        torch.testing.assert_close(operator @ v, expected)
        torch.rand(1)
    other = FisherOperator(problem.model, problem.loss_fn, problem.pair, labels="model", seed=4) @ v
    assert not torch.allclose(other, expected)


def test_sampled_labels_of_a_shuffled_loader():
    problem = small()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*problem.pair), 8, shuffle=True
    )
    whole, shuffled = (
        top_eigenpairs(FisherOperator(problem.model, problem.loss_fn, data, labels="model"), seed=0)
        for data in (problem.pair, loader)
    )
    assert shuffled.converged
    assert (shuffled.matvecs, shuffled.values.item()) == (
        whole.matvecs,
        pytest.approx(whole.values.item()),
    )


class TestDraws:
    def test_as_splitmix64_in_plain_integers(self):
        """The oracle is Python's own whole numbers, reduced modulo 2^64."""

        def mixed(value):
            value %= 2**64
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                value = (value ^ (value >> shift)) * factor % 2**64
            return value ^ (value >> 31)

        rows, seed = [[3, -7, 0], [2**40, 5, 1]], 11
        odd = [mixed(place + mixed(seed)) | 1 for place in (1, 2, 3)]
        expected = [
            mixed(seed + sum(v * o for v, o in zip(row, odd, strict=True))) >> 11 for row in rows
        ]
        found = draws_by_content(torch.tensor(rows), 2, seed)
        assert (found * 2**53).long().tolist() == expected

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.complex64]
    )
    def test_uniform_whatever_the_type(self, dtype):
        values = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
        values = (values * 50).to(dtype) if dtype == torch.uint8 else values.to(dtype)
        draws = draws_by_content(
            {"x": values, "places": torch.arange(4000), "shared": torch.ones(3)}, 4000, 0
        )
        assert ((draws >= 0) & (draws < 1)).all()
        counts = torch.histc(draws, 10, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 30  # chi-squared, 9 degrees of freedom: 4e-4

    def test_alike_for_examples_that_are_alike_and_padded(self):
        ids = torch.tensor([[4, 2, 0], [4, 2, 1], [4, 2, 0]])
        first, second, third = draws_by_content(ids, 3, 0)
        assert first == third != second
        assert draws_by_content(ids[:1, :2], 1, 0)[0] == first


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
    with pytest.raises(
        HessianFlowError, match=r"GGNOperator needs pairs \(inputs, targets\), got a dict"
    ):
        GGNOperator(problem.model, problem.loss_fn, batch) @ torch.ones(64, dtype=torch.float64)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = problem.model

        def forward(self, x):
            return self.body(x), x

    several = GGNOperator(Several(), problem.loss_fn, problem.pair, microbatch_size=None)
    with pytest.raises(
        HessianFlowError, match=r"needs a model that returns one tensor .*, got tuple"
    ):
        several @ torch.ones(64, dtype=torch.float64)
    with pytest.raises(HessianFlowError, match="labels must be one of data, model, got 'true'"):
        FisherOperator(problem.model, problem.loss_fn, problem.pair, labels="true")
    regression = FisherOperator(
        problem.model, functional.mse_loss, (problem.inputs, problem.inputs[:, :4]), labels="model"
    )
    with pytest.raises(
        HessianFlowError, match=r"labels='model' needs outputs \[N, classes\] and class indices"
    ):
        regression @ torch.ones(64, dtype=torch.float64)
