"""What a mean divides by, for losses of every make. Oracle: the loss of the whole batch in one
call, float64."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow.interfaces import HessianFlowError
from hessianflow.losses import MeanLoss, SplitCheck, WeightedLoss, mean_loss

CLASSES = 5
ROWS = 12
LENGTH = 6
WEIGHT = torch.tensor([0.1, 1.0, 5.0, 0.0, 2.0], dtype=torch.float64)


def tokens():
    """Scores [rows, length, classes] and targets [rows, length], of which a varying number is
    padding."""
    source = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS, LENGTH, CLASSES, generator=source, dtype=torch.float64)
    targets = torch.randint(CLASSES, (ROWS, LENGTH), generator=source)
    for row in range(ROWS):
        targets[row, 1 + row % LENGTH :] = -100
    return scores, targets


class InsideAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)

    def forward(self, outputs, targets):
        return self.inner(outputs.flatten(0, 1), targets.flatten())


class Focal(nn.CrossEntropyLoss):
    """Says mean and divides by all elements, ignored ones included."""

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


class Inherited(nn.CrossEntropyLoss):
    """Another name for torch's own."""


def flattened(outputs, targets):
    return outputs.flatten(0, 1), targets.flatten()


def masked_by_hand(outputs, targets):
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    counts = targets != -100
    return (losses * counts).sum() / counts.sum()


def sum_and_count(outputs, targets):
    total = F.cross_entropy(*flattened(outputs, targets), reduction="sum")
    return total, (targets != -100).sum()


TOKEN_LOSSES = {
    "lambda": lambda o, t: F.cross_entropy(*flattened(o, t)),
    "lambda, class weights": lambda o, t: F.cross_entropy(*flattened(o, t), weight=WEIGHT),
    "a multiple": lambda o, t: 0.3 * F.cross_entropy(*flattened(o, t)),
    "negative log-likelihood": lambda o, t: F.nll_loss(
        F.log_softmax(o.flatten(0, 1), 1), t.flatten()
    ),
    "a module inside": InsideAModule(),
    "focal": Focal(),
    "inherited": lambda o, t: Inherited()(*flattened(o, t)),
    "selected": lambda o, t: F.mse_loss(o[t >= 0].sum(1), t[t >= 0].double()),
    "mean of selected": lambda o, t: (o[t >= 0] ** 2).mean(),
    "masked by hand": masked_by_hand,
    "sum and count": sum_and_count,
    "stated": WeightedLoss(
        lambda o, t: o[t >= 0].sum() / (t >= 0).sum().item(), lambda o, t: (t >= 0).sum()
    ),
    "values": lambda o, t: F.cross_entropy(*flattened(o, t), reduction="none"),
    "torch's own over places": functools.partial(
        lambda o, t, loss: loss(o.transpose(1, 2), t), loss=nn.CrossEntropyLoss()
    ),
    "examples": lambda o, t: o.square().sum() / len(t),
}


def over_parts(loss, outputs, targets, sizes):
    parts = [loss(*pair) for pair in zip(outputs.split(sizes), targets.split(sizes), strict=True)]
    total = sum(float(part.weight) for part in parts)
    return (
        sum(float(part.value) * float(part.weight) for part in parts if float(part.weight) > 0)
        / total
    )


@pytest.mark.parametrize("sizes", [[4, 8], [1, 1, 10], [7, 5]], ids=str)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_the_weighted_mean_of_parts_is_the_loss_of_the_whole(name, sizes):
    outputs, targets = tokens()
    loss = MeanLoss(TOKEN_LOSSES[name])
    whole = loss(outputs, targets).value
    assert over_parts(loss, outputs, targets, sizes) == pytest.approx(float(whole), rel=1e-12)
    SplitCheck(loss)(outputs, targets)  # and so it is not refused


@pytest.mark.parametrize(
    ("loss_fn", "reduced"),
    [
        (nn.MSELoss(), F.mse_loss),
        (nn.MSELoss(reduction="sum"), lambda o, t: F.mse_loss(o, t, reduction="sum") / ROWS),
        (
            lambda o, t: F.mse_loss(o, t, reduction="sum"),
            lambda o, t: F.mse_loss(o, t, reduction="sum") / ROWS,
        ),
        (nn.MSELoss(reduction="none"), F.mse_loss),
        (lambda o, t: (o - t).abs(), F.l1_loss),
        (lambda o, t: ((o - t).abs().sum(), 2 * len(o)), lambda o, t: F.l1_loss(o, t) * LENGTH / 2),
    ],
    ids=["mean", "sum", "sum in a lambda", "none", "values", "sum and count"],
)
def test_every_reduction_counts_as_the_mean(loss_fn, reduced):
    source = torch.Generator().manual_seed(1)
    outputs, targets = torch.randn(2, ROWS, LENGTH, generator=source, dtype=torch.float64)
    assert float(mean_loss(loss_fn, outputs, targets)) == pytest.approx(
        float(reduced(outputs, targets)), rel=1e-12
    )


def test_the_weight_is_what_torch_divides_by():
    outputs, targets = tokens()
    flat = flattened(outputs, targets)
    for weight in (None, WEIGHT):
        total = F.cross_entropy(*flat, weight=weight, reduction="sum")
        expected = float(total / F.cross_entropy(*flat, weight=weight))
        found = MeanLoss(lambda o, t, w=weight: F.cross_entropy(*flattened(o, t), weight=w))(
            outputs, targets
        )
        assert float(found.weight) == pytest.approx(expected, rel=1e-12)
        assert float(
            MeanLoss(nn.CrossEntropyLoss(weight=weight)).weight_ahead(flat[1])
        ) == pytest.approx(expected)
        assert found.ignore_index == -100


def test_probabilities_as_targets_count_by_places():
    outputs = tokens()[0]
    soft = outputs.flip(0).softmax(-1)
    loss = MeanLoss(lambda o, t: F.cross_entropy(o.transpose(1, 2), t.transpose(1, 2)))
    assert loss(outputs, soft).weight == ROWS * LENGTH
    assert over_parts(loss, outputs, soft, [5, 7]) == pytest.approx(
        float(loss(outputs, soft).value), rel=1e-12
    )


def test_two_losses_of_different_divisors_are_refused_where_a_batch_is_cut():
    """Token losses with padding beside a mean over examples: no single weight makes the mean of
    parts right."""
    outputs, targets = tokens()

    def both(o, t):
        return F.cross_entropy(*flattened(o, t)) + F.mse_loss(
            o.sum((1, 2)), t.double().sum(1) / 100
        )

    with pytest.raises(HessianFlowError, match=r"the loss of 12 examples is .*hf\.WeightedLoss"):
        SplitCheck(MeanLoss(both))(outputs, targets)


def test_a_loss_that_compares_rows_is_refused():
    """Contrastive: the rows of a batch are each other's negatives, though cross_entropy is what is
    returned."""
    source = torch.Generator().manual_seed(2)
    outputs = torch.randn(ROWS, 4, generator=source, dtype=torch.float64)
    loss = MeanLoss(lambda o, t: F.cross_entropy(o @ o.flip(0).T, torch.arange(len(t))))
    with pytest.raises(HessianFlowError, match="keep every batch in one pass"):
        SplitCheck(loss)(outputs, torch.arange(ROWS))


def test_single_rows_are_joined_before_they_are_compared():
    outputs, targets = tokens()
    check = SplitCheck(
        MeanLoss(lambda o, t: F.cross_entropy(*flattened(o, t)) + o.square().sum((1, 2)).mean())
    )
    check(outputs[:1], targets[:1])
    with pytest.raises(HessianFlowError, match="the loss of 2 examples"):
        check(outputs[3:4], targets[3:4])


def test_the_check_comes_back_when_padding_does():
    """Rows that all count show nothing; the loss is wrong only where padding varies."""
    outputs, targets = tokens()
    full = torch.zeros_like(targets)

    def wrong(o, t):
        return F.cross_entropy(*flattened(o, t)) + o.square().sum((1, 2)).mean()

    check = SplitCheck(MeanLoss(wrong))
    check(outputs, full)
    with pytest.raises(HessianFlowError, match="weighted by what cross_entropy divides by"):
        check(outputs, targets)


def test_a_random_loss_is_not_refused():
    outputs, targets = tokens()
    SplitCheck(MeanLoss(lambda o, t: (o * torch.rand_like(o)).sum() / len(t)))(outputs, targets)


def test_checking_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(LENGTH, dtype=torch.float64)
            self.dropout = nn.Dropout(0.5)
            self.norm.eval()

        def forward(self, outputs, targets):
            assert self.training
            assert not self.norm.training
            return self.norm(outputs).square().mean() * torch.rand(()).sign()

    loss_fn = Counting().double().train()
    loss_fn.norm.eval()
    before = torch.get_rng_state()
    outputs, targets = tokens()
    SplitCheck(MeanLoss(loss_fn))(outputs, targets)
    assert torch.equal(before, torch.get_rng_state())
    assert int(loss_fn.norm.num_batches_tracked) == 0
    assert loss_fn.training


def test_outputs_without_rows_are_refused_unless_torch_says_what_it_divides_by():
    outputs, targets = tokens()
    flat = outputs.flatten(0, 1)
    SplitCheck(MeanLoss(lambda o, t: F.cross_entropy(o, t.flatten())))(flat, targets)
    with pytest.raises(HessianFlowError, match="no row for each example"):
        SplitCheck(MeanLoss(lambda o, t: o.square().sum() / len(t)))(flat, targets)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.5, "must be a tensor, or a pair .sum, count., got a float"),
        ((torch.ones(()), {}), "got a tuple of 2"),
        ((torch.ones(3), 3), r"two scalars, got a tensor of shape \[3\]"),
        (None, "got a NoneType"),
    ],
)
def test_what_is_no_loss_is_named(result, message):
    with pytest.raises(HessianFlowError, match=message):
        mean_loss(lambda o, t: result, torch.ones(3), torch.ones(3))


def test_nothing_that_counts_has_weight_0_and_no_gradient_of_nan():
    outputs, targets = tokens()
    outputs.requires_grad_()
    padding = torch.full_like(targets, -100)
    found = MeanLoss(sum_and_count)(outputs, padding)
    assert float(found.weight) == 0
    assert float(found.value.detach()) == 0
    (gradient,) = torch.autograd.grad(found.value, outputs)
    assert not gradient.any()
    assert float(MeanLoss(TOKEN_LOSSES["lambda"])(outputs, padding).weight) == 0
