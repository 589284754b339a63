"""Branches at several batch sizes: the same examples, the rate of the rule, the comparison."""

import math

import pytest
import torch
from problems import bright_or_dark
from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.planning import Branch, SizeResult, Start, branch, compared, critical_size
from hessianflow.planning.branches import Window, crossing
from hessianflow.training import Passes


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def start(repeat, lr=0.1):
    model = net()
    data = bright_or_dark(40, 8, seed=repeat)
    return Start(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        data,
        8,
        nn.CrossEntropyLoss(),
        data.examples(torch.arange(40)),
        Passes(),
        8,
    )


def drawn(size, rounds, round_examples=24, count=40):
    window = Window(bright_or_dark(count, 8), size, round_examples)
    return [batch for _ in range(rounds) for batch in window]


def test_every_size_sees_the_same_examples_across_the_ends_of_epochs():
    """72 examples of 40: batches go on in the next epoch, where an epoch would end in a smaller."""
    small, large = drawn(8, 3), drawn(24, 3)
    assert [len(targets) for _, targets in small] == [8] * 9
    assert [len(targets) for _, targets in large] == [24] * 3
    for part in (0, 1):
        both = [torch.cat([batch[part] for batch in batches]) for batches in (small, large)]
        assert torch.equal(*both)


def by_hand(size, rounds, round_examples, lr, momentum=0.9):
    """The same steps by a plain loop."""
    begun = start(0)
    model = begun.model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    window = Window(begun.data, size, round_examples)
    inputs, targets = begun.evaluated
    losses = []
    for _ in range(rounds):
        for batch in window:
            optimizer.zero_grad()
            begun.loss_fn(model(batch[0]), batch[1]).backward()
            optimizer.step()
        losses.append(begun.loss_fn(model(inputs), targets).item())
    return losses


@pytest.mark.parametrize(
    ("rule", "size", "rate"), [("linear", 24, 0.3), ("sqrt", 24, 0.1 * 3**0.5), ("none", 8, 0.1)]
)
def test_a_branch_is_plain_training_at_the_rate_of_the_rule(rule, size, rate):
    found = branch(start, size, 0, rule, 4, 24)
    assert found.losses == pytest.approx(by_hand(size, 4, 24, rate), rel=1e-5)
    assert found.loss == found.losses[-1]
    assert found.updates == 4 * 24 // size
    assert found.lr_factor == pytest.approx(rate / 0.1)
    inputs, targets = start(0).evaluated
    first = nn.functional.cross_entropy(net()(inputs), targets)
    assert found.start_loss == pytest.approx(first.item(), rel=1e-6)


def test_the_last_quarter_is_averaged():
    found = branch(start, 24, 0, "linear", 8, 24)
    assert found.loss == pytest.approx(sum(found.losses[-2:]) / 2)


def test_a_branch_that_diverges_has_an_infinite_loss():
    found = branch(lambda repeat: start(repeat, lr=1e30), 8, 0, "linear", 4, 24)
    assert len(found.losses) == 4
    assert found.loss == math.inf
    row = found.to_dict()
    assert row["loss"] is None
    assert Branch.from_dict(row) == found


def test_a_damaged_row_is_refused():
    row = branch(start, 24, 0, "linear", 1, 24).to_dict()
    for name in row:
        with pytest.raises(HessianFlowError, match="damaged"):
            Branch.from_dict({**row, name: "much"})


def of(size, repeat, loss):
    return Branch(size, repeat, 1.0, 1, 2.0, (loss,), loss)


def test_each_repeat_is_compared_with_its_own_smallest():
    pairs = [of(8, 0, 1.0), of(16, 0, 1.2), of(8, 1, 0.5), of(16, 1, 0.6)]
    small, large = compared(pairs)
    assert (small.excess, small.stderr) == (0.0, 0.0)
    assert large.excess == pytest.approx(0.075)  # 0.2 and 0.1 of a first loss of 2
    assert large.stderr == pytest.approx(0.025)
    assert large.loss == pytest.approx(0.9)
    diverged = compared([*pairs, of(32, 0, math.inf), of(32, 1, 0.5)])[-1]
    assert (diverged.excess, diverged.stderr) == (math.inf, 0.0)


def results(*excess):
    return [SizeResult(8 * 2**n, 1.0, 1, 1.0, share, 0.0) for n, share in enumerate(excess)]


@pytest.mark.parametrize(
    ("excess", "critical", "crosses"),
    [
        ((0.0, 0.01, 0.03, 0.2), 16, 16 * 2**0.5),
        ((0.0, -0.02, 0.01), 32, math.inf),
        ((0.0, 0.04, 0.0), 8, 8 * 2**0.5),
        ((0.0, 0.0, math.inf), 16, 16),
        ((0.0, math.nan), 8, 8),
    ],
)
def test_the_critical_batch_is_the_last_before_the_tolerance_is_passed(excess, critical, crosses):
    assert critical_size(results(*excess), 0.02) == critical
    assert crossing(results(*excess), 0.02) == pytest.approx(crosses)
