"""Losses that do not divide by the number of examples: class weights and ignored targets, in parts
or in one pass."""

from functools import partial

import pytest
import torch
from problems import Problem, classification, mlp
from torch import nn
from torch.nn import functional

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses import WeightedLoss

WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)
LOSSES = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "ignored": nn.CrossEntropyLoss(ignore_index=2),
    "both, as a function": partial(functional.cross_entropy, weight=WEIGHT, ignore_index=1),
}
BY_HAND = {
    "class weights": (WEIGHT, -100),
    "ignored": (torch.ones(4), 2),
    "both, as a function": (WEIGHT, 1),
}
OPERATORS = [HessianOperator, GGNOperator, FisherOperator]


def small():
    return classification(mlp((5, 6, 4)), (5,), 30, 4)


def tiny():
    """For whole matrices by parts of one example."""
    return classification(mlp((2, 2, 4)), (2,), 15, 4)


def by_hand(problem, loss_name, kind):
    """Dense float64 autograd on sum_n w_n loss_n / sum_n w_n, the weights written out."""
    weight, ignored = BY_HAND[loss_name]
    weights = weight[problem.targets] * (problem.targets != ignored)
    names, tensors = zip(*problem.model.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]

    def losses(flat):
        pieces = [p.view_as(t) for p, t in zip(torch.split(flat, sizes), tensors, strict=True)]
        outputs = torch.func.functional_call(
            problem.model, dict(zip(names, pieces, strict=True)), (problem.inputs,)
        )
        return functional.cross_entropy(outputs, problem.targets, reduction="none")

    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    if kind is HessianOperator:
        return torch.autograd.functional.hessian(
            lambda w: (weights * losses(w)).sum() / weights.sum(), flat
        )
    rows = torch.autograd.functional.jacobian(losses, flat)
    return rows.T @ (rows * weights[:, None]) / weights.sum()


@pytest.mark.parametrize("microbatch_size", [None, 1, 7])
@pytest.mark.parametrize("kind", [HessianOperator, FisherOperator])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_the_matrix_is_that_of_the_weighted_mean(loss_name, kind, microbatch_size):
    problem = tiny()
    found = kind(
        problem.model, LOSSES[loss_name], problem.pair, microbatch_size=microbatch_size
    ).dense()
    torch.testing.assert_close(found, by_hand(problem, loss_name, kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_microbatches_and_uneven_batches_equal_one_pass(loss_fn, kind):
    problem = small()
    whole = kind(problem.model, loss_fn, problem.pair)
    pairs = list(zip(problem.inputs.split([4, 26]), problem.targets.split([4, 26]), strict=True))
    v = torch.randn(whole.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for data, microbatch_size in ((problem.pair, 7), (pairs, None), (pairs, 3)):
        parts = kind(problem.model, loss_fn, data, microbatch_size=microbatch_size)
        torch.testing.assert_close(parts @ v, whole @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.gradient(), whole.gradient(), rtol=1e-12, atol=1e-12)
        assert parts.mean_loss() == pytest.approx(whole.mean_loss(), rel=1e-12)
        assert parts.loss_weight == pytest.approx(whole.loss_weight, rel=1e-12)


def test_gauss_newton_and_sampled_fisher_weigh_alike():
    """For cross-entropy they agree in expectation over the labels drawn: 100 draws, five standard
    errors."""
    problem = small()
    arguments = (problem.model, LOSSES["class weights"], problem.pair)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forms = torch.stack(
        [v @ (FisherOperator(*arguments, labels="model", seed=s) @ v) for s in range(100)]
    )
    expected = v @ (GGNOperator(*arguments) @ v)
    assert abs(forms.mean() - expected) <= 5 * forms.std() / 10


def test_products_are_weighted_by_what_the_mean_divides_by():
    problem, loss_fn = small(), LOSSES["class weights"]
    v = torch.ones(64, dtype=torch.float64)
    parts = [
        HessianOperator(problem.model, loss_fn, (problem.inputs[rows], problem.targets[rows]))
        for rows in (slice(0, 11), slice(11, 30))
    ]
    weights = tuple(part.loss_weight for part in parts)
    sums = [(part @ v) * weight for part, weight in zip(parts, weights, strict=True)]
    expected = [
        float(WEIGHT[problem.targets[rows]].sum()) for rows in (slice(0, 11), slice(11, 30))
    ]
    assert weights == pytest.approx(expected)
    whole = HessianOperator(problem.model, loss_fn, problem.pair)
    torch.testing.assert_close(sum(sums) / sum(weights), whole @ v, rtol=1e-12, atol=1e-12)


def test_labels_drawn_do_not_hang_on_what_was_asked_before():
    problem = small()
    first, second = (
        FisherOperator(problem.model, functional.cross_entropy, problem.pair, labels="model")
        for _ in "ab"
    )
    second.gradient()
    assert torch.equal(first.dense(), second.dense())


@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_no_counted_target_at_all_is_refused(microbatch_size):
    problem = small()
    targets = torch.full_like(problem.targets, -100)
    operator = HessianOperator(
        problem.model,
        functional.cross_entropy,
        (problem.inputs, targets),
        microbatch_size=microbatch_size,
    )
    with pytest.raises(HessianFlowError, match="no target counts: all are ignored or of weight 0"):
        operator @ torch.ones(64, dtype=torch.float64)


def test_nested_inputs_are_one_pair():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp((5, 6, 4))

        def forward(self, inputs):
            return self.body(inputs[0] + inputs[1])

    problem, v = small(), torch.ones(64, dtype=torch.float64)
    whole = HessianOperator(Two().body, functional.cross_entropy, problem.pair) @ v
    halves = (problem.inputs / 2, problem.inputs / 2)
    nested = HessianOperator(Two(), functional.cross_entropy, (halves, problem.targets))
    torch.testing.assert_close(nested @ v, whole)
    listed = [(halves, problem.targets), (halves, problem.targets)]
    torch.testing.assert_close(HessianOperator(Two(), functional.cross_entropy, listed) @ v, whole)


# Losses of the user's own: nothing but the call tells what they divide by.


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.ce = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)

    def forward(self, outputs, targets):
        return self.ce(outputs, targets)


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def by_count(outputs, targets):
    counts = targets != 1
    return (
        functional.cross_entropy(outputs, targets, reduction="none") * counts
    ).sum() / counts.sum()


OWN_LOSSES = {
    "a module around torch's": Inside(),
    "a subclass": Focal(),
    "masked by hand": by_count,
    "sum and count": lambda o, t: (
        functional.cross_entropy(o, t, reduction="sum", ignore_index=1),
        (t != 1).sum(),
    ),
    "stated": WeightedLoss(by_count, lambda o, t: (t != 1).sum()),
}


def dense_hessian(problem, loss_fn):
    """Rows of the Hessian by plain autograd in one pass."""
    parameters = list(problem.model.parameters())
    found = loss_fn(problem.model(problem.inputs), problem.targets)
    loss = found[0] / found[1] if isinstance(found, tuple) else found
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        for entry in gradient
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 7, 1])
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_own_losses_give_one_matrix_in_parts_and_in_one_pass(name, microbatch_size):
    problem, loss_fn = tiny(), OWN_LOSSES[name]
    expected = dense_hessian(problem, loss_fn)
    pairs = list(zip(problem.inputs.split([4, 11]), problem.targets.split([4, 11]), strict=True))
    for data in (problem.pair, pairs):
        found = HessianOperator(problem.model, loss_fn, data, microbatch_size=microbatch_size)
        torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_own_losses_give_the_fisher_and_gauss_newton_of_the_weighted_examples(name):
    problem, loss_fn = tiny(), OWN_LOSSES[name]
    if name == "a subclass":
        weights = torch.ones(15, dtype=torch.float64)
    else:
        weights = (problem.targets != 1).double()
    if name == "a module around torch's":
        weights = weights * WEIGHT[problem.targets]
    parameters = list(problem.model.parameters())
    total = 0
    for n in weights.nonzero()[:, 0]:
        one = Problem(problem.model, loss_fn, problem.inputs[n : n + 1], problem.targets[n : n + 1])
        found = loss_fn(one.model(one.inputs), one.targets)
        loss = found[0] / found[1] if isinstance(found, tuple) else found
        row = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
        total = total + weights[n] * torch.outer(row, row)
    found = FisherOperator(problem.model, loss_fn, problem.pair).dense()
    torch.testing.assert_close(found, total / weights.sum(), rtol=1e-9, atol=1e-12)
    parts = GGNOperator(problem.model, loss_fn, problem.pair, microbatch_size=4).dense()
    whole = GGNOperator(problem.model, loss_fn, problem.pair).dense()
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def tokens_in_a_dict():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11)).double()
    ids = torch.randint(0, 11, (8, 12))
    labels = ids.roll(-1, 1)
    for row in range(8):
        labels[row, 12 - row :] = -100
    return net, {"ids": ids, "labels": labels}


def language_loss(model, batch):
    return functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


def test_a_dict_of_tokens_gives_one_matrix_for_any_microbatch():
    net, batch = tokens_in_a_dict()
    whole = HessianOperator(net, language_loss, batch)
    v = torch.randn(whole.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = [
        {key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 8))
    ]
    for data, microbatch_size in ((batch, 2), (batch, 1), (halves, None)):
        parts = HessianOperator(net, language_loss, data, microbatch_size=microbatch_size)
        torch.testing.assert_close(parts @ v, whole @ v, rtol=1e-10, atol=1e-12)
        assert parts.mean_loss() == pytest.approx(whole.mean_loss(), rel=1e-12)
        assert parts.loss_weight == whole.loss_weight == float((batch["labels"] != -100).sum())


def test_parts_without_a_target_are_left_out():
    net, batch = tokens_in_a_dict()
    batch["labels"][2:4] = -100
    whole, parts = (
        HessianOperator(net, language_loss, batch, microbatch_size=size) for size in (None, 2)
    )
    v = torch.ones(whole.size, dtype=torch.float64)
    torch.testing.assert_close(parts @ v, whole @ v, rtol=1e-10, atol=1e-12)
    batch["labels"][:] = -100
    for size in (None, 2):
        with pytest.raises(HessianFlowError, match="no target counts"):
            HessianOperator(net, language_loss, batch, microbatch_size=size) @ v


def contrastive(outputs, targets):
    return functional.cross_entropy(outputs @ outputs.T, torch.arange(len(targets)))


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_loss_that_compares_examples_is_measured_in_one_pass_or_refused(kind):
    problem = small()
    v = torch.ones(64, dtype=torch.float64)
    assert (kind(problem.model, contrastive, problem.pair) @ v).isfinite().all()
    with pytest.raises(HessianFlowError, match="as the mean over parts"):
        kind(problem.model, contrastive, problem.pair, microbatch_size=10) @ v
    with pytest.raises(HessianFlowError, match="as the mean over parts"):
        kind(problem.model, contrastive, [problem.pair, problem.pair]) @ v
    with pytest.raises(HessianFlowError, match="as the mean over parts"):
        FisherOperator(problem.model, contrastive, problem.pair) @ v
