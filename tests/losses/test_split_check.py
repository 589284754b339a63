"""Whether a loss may be cut is told by rows that differ, wherever they are; the oracle is the loss
of the whole."""

import pytest
import torch
from torch.nn import functional as F

from hessianflow.batches import split
from hessianflow.curvature import HessianOperator
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses import MeanLoss, SplitCheck

ROWS, CLASSES = 12, 3
WEIGHTS = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)


def by_class(outputs, targets):
    """Weighs classes, in a form that nothing can be seen in."""
    losses = F.cross_entropy(outputs, targets, reduction="none") * WEIGHTS[targets]
    return losses.sum() * (1 / float(WEIGHTS[targets].sum()))


def by_valid_targets(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum") / float(
        (targets >= 0).sum() or torch.nan
    )


def kept_from_0(outputs, targets, keep=lambda count: count.clamp(min=1)):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.sum() / keep((targets >= 0).sum())


def problem(*, padding=0):
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, 4, generator=source, dtype=torch.float64)
    targets = torch.arange(ROWS) // (ROWS // CLASSES)  # sorted: each part is of one class
    targets[:padding] = -100
    torch.manual_seed(0)
    return torch.nn.Linear(4, CLASSES, dtype=torch.float64), inputs, targets


def test_parts_of_one_class_each_are_compared_with_each_other():
    net, inputs, targets = problem()
    loss = MeanLoss(by_class)
    whole = loss(net(inputs), targets).value.detach()
    parts = [loss(net(x), y).value.detach() for x, y in split((inputs, targets), 4)]
    # equal numbers of examples, but not of weights
    assert abs(float(sum(parts) / 3 - whole)) > 0.01
    with pytest.raises(HessianFlowError, match="weighted by examples"):
        HessianOperator(net, by_class, (inputs, targets), microbatch_size=4).mean_loss()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_losses_hide_no_weights(dtype):
    """A head of zeros gives every example the loss log 3, and any weighted mean of that is log
    3."""
    targets = torch.tensor([0, 1, 2, 1, 0, 2])
    outputs = torch.zeros(6, 3, dtype=dtype)

    def loss(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none") * WEIGHTS.to(dtype)[targets]
        return losses.sum() * (1 / float(WEIGHTS[targets].sum()))

    with pytest.raises(HessianFlowError, match="another gradient than the mean over two parts"):
        SplitCheck(MeanLoss(loss))(outputs, targets)
    SplitCheck(MeanLoss(lambda o, t: 2 * F.cross_entropy(o, t, WEIGHTS.to(dtype))))(
        outputs, targets
    )
    SplitCheck(MeanLoss(lambda o, t: F.cross_entropy(o, t) * 2))(outputs, targets)
    SplitCheck(MeanLoss(lambda o, t: (o.detach() - 1).square().mean()))(outputs, targets)


def test_a_part_of_padding_alone_hides_nothing():
    """The first part's loss is not a number; the loss of its rows beside others is one."""
    net, inputs, targets = problem(padding=5)
    with pytest.raises(HessianFlowError, match="but nan as the mean over parts of 2 and 4"):
        HessianOperator(net, by_valid_targets, (inputs, targets), microbatch_size=6).mean_loss()


@pytest.mark.parametrize(
    "keep",
    [
        lambda count: count.clamp(min=1),
        lambda count: count.clamp_min(1),
        lambda count: torch.clamp(count, min=1),
        lambda count: torch.maximum(count, torch.ones_like(count)),
        lambda count: count,
    ],
)
@pytest.mark.parametrize("microbatch_size", [1, 2, 4, 5])
def test_a_count_that_is_kept_from_0_counts_nothing_where_nothing_is(keep, microbatch_size):
    net, inputs, targets = problem(padding=5)
    operator = HessianOperator(
        net,
        lambda o, t: kept_from_0(o, t, keep),
        (inputs, targets),
        microbatch_size=microbatch_size,
    )
    vector = torch.ones(operator.size, dtype=torch.float64)
    exact = HessianOperator(net, F.cross_entropy, (inputs[5:], targets[5:]))
    torch.testing.assert_close(operator @ vector, exact @ vector)
    assert operator.loss_weight == ROWS - 5


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 4)])
def test_parts_of_other_lengths_are_not_joined(sizes):
    """As a loader makes them that pads each batch to its own length."""
    source = torch.Generator().manual_seed(0)
    check = SplitCheck(
        MeanLoss(lambda outputs, targets: (outputs - targets).square().mean((1,)).mean())
    )
    for number, rows in enumerate(sizes):
        outputs = torch.randn(rows, 5 + number, generator=source)
        check(outputs, torch.zeros_like(outputs))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("rows", [(1, 1), (2, 2), (3, 5)])
def test_outputs_and_targets_in_several_tensors_are_cut(kind, rows):
    """Two tensors of two rows may be taken for two examples; those of a model are not."""
    source = torch.Generator().manual_seed(0)

    def healthy(outputs, targets):
        return ((outputs[0] - targets[0]) * (outputs[1] - targets[1])).mean()

    def wrong(outputs, targets):
        return healthy(outputs, targets) + outputs[0].mean().square()

    parts = [
        [
            kind(torch.randn(n, 2, generator=source, dtype=torch.float64) for _ in range(2))
            for _ in range(2)
        ]
        for n in rows
    ]

    def check_all(loss):
        check = SplitCheck(MeanLoss(loss))
        for outputs, targets in parts:
            check(outputs, targets)

    check_all(healthy)
    with pytest.raises(HessianFlowError, match="as the mean over parts"):
        check_all(wrong)


def test_a_loss_that_takes_no_fewer_rows_is_refused_in_one_line():
    check = SplitCheck(MeanLoss(lambda outputs, targets: outputs.view(4, 3).square().sum()))
    with pytest.raises(
        HessianFlowError, match=r"cannot be computed for 1 of 4 examples \(RuntimeError\)"
    ):
        check(torch.ones(4, 3), torch.ones(4))


def test_what_is_kept_between_parts_has_no_graph():
    outputs = torch.ones(6, 3, requires_grad=True) * 2
    check = SplitCheck(MeanLoss(lambda o, t: o.square().mean()))
    check(outputs, torch.ones(6))
    kept, _ = check._kept
    assert kept.shape == (2, 3)
    assert kept.untyped_storage().nbytes() == 24
    assert not kept.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 5.0, 20.0, 1000.0])
def test_a_fit_to_the_last_digit_is_not_refused(dtype, margin):
    """In 16 bits the losses of examples that are surely right have no digits left."""

    def focal(outputs, targets):
        right = outputs.gather(1, targets[:, None])
        missed = 1 - right.sub(outputs.logsumexp(1, keepdim=True)).exp()
        return (missed.square() * (outputs.logsumexp(1, keepdim=True) - right)).mean()

    for seed in range(4):
        source = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 2, (16,), generator=source)
        outputs = torch.randn(16, 2, generator=source) * 0.1 + F.one_hot(targets, 2) * margin
        for loss in (focal, lambda o, t: F.cross_entropy(o, t) * 1):
            SplitCheck(MeanLoss(loss))(outputs.to(dtype), targets)


@pytest.mark.parametrize("what", ["sum", "mean"])
def test_a_mean_that_is_returned_for_a_sum_is_seen_where_the_batch_is_cut(what):
    """(sum, count) of the parts adds up to that of the whole; (mean, count) gives twice as much for
    two parts."""

    def stated(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return (losses.sum() if what == "sum" else losses.mean()), len(targets)

    net, inputs, targets = problem()
    whole = HessianOperator(net, stated, (inputs, targets)).mean_loss()
    in_parts = HessianOperator(net, stated, (inputs, targets), microbatch_size=4)
    if what == "sum":
        assert in_parts.mean_loss() == pytest.approx(whole, rel=1e-12)
    else:
        with pytest.raises(HessianFlowError, match="weighted by the count it states"):
            in_parts.mean_loss()
