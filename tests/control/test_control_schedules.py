"""Schedules against hand-worked tables."""

import itertools

import pytest

from hessianflow.control import AdaBatch, FixedBatch, GrowInsteadOfDecay, Warmup
from hessianflow.interfaces import BatchController, Decision, HessianFlowError, Progress


def progress(epoch: int, examples: int | None = None, examples_per_epoch: int = 50_000) -> Progress:
    used = epoch * examples_per_epoch if examples is None else examples
    return Progress(epoch, used, 0, examples_per_epoch, 100)


def run(controller: BatchController, epochs: int) -> list[Decision]:
    return [controller.decision] + [controller.update(progress(e)) for e in range(1, epochs + 1)]


def test_fixed_batch_never_changes_and_is_never_due() -> None:
    controller = FixedBatch(64)
    assert not controller.is_due(progress(3))
    assert controller.needs == frozenset()
    assert set(run(controller, 3)) == {Decision(64, 1.0, 1.0)}


def test_warmup_rises_linearly_to_the_scaled_rate() -> None:
    """Batch 8192 of reference 256: k = 32 after 5 epochs; half of the ramp, after 2.5 epochs, is 1
    + 31/2 = 16.5."""
    controller = Warmup(256, 8192, warmup_epochs=5)
    assert controller.decision == Decision(8192, 1.0)
    assert not controller.is_due(progress(0))
    assert controller.is_due(progress(0, 8192))
    first = controller.update(progress(0, 8192))
    assert first.lr_factor == pytest.approx(1 + 31 * 8192 / 250_000)
    assert first.reason == "warm-up: 0.1638 of 5 epochs"
    assert controller.update(progress(2, 125_000)).lr_factor == 16.5
    assert controller.update(progress(5, 250_000)).lr_factor == 32
    assert not controller.is_due(progress(5, 260_000))
    assert controller.update(progress(6)) == Decision(8192, 32)


def test_warmup_of_no_epochs_is_linear_scaling() -> None:
    controller = Warmup(128, 512, warmup_epochs=0)
    assert controller.decision == Decision(512, 4.0)
    assert not controller.is_due(progress(1))
    assert controller.update(progress(1)) == Decision(512, 4.0)


def test_adabatch_published_setting() -> None:
    """128, 256, 512 with rates 0.1, 0.075, 0.05625 over 60 epochs."""
    decisions = run(AdaBatch(128, 50_000), 59)
    assert [decisions[e].batch_size for e in (0, 19, 20, 39, 40, 59)] == [
        128,
        128,
        256,
        256,
        512,
        512,
    ]
    rates = [0.1 * decisions[e].lr_factor for e in (0, 20, 40)]
    assert rates == pytest.approx([0.1, 0.075, 0.05625])
    assert [d.reason for d in decisions[19:22]] == ["", "epoch 20 is a multiple of 20", ""]


def test_adabatch_under_a_cap_keeps_the_decay_per_example() -> None:
    """Rate over batch falls by 0.375 at each event, with 128 -> 256 -> 300 -> 300."""
    decisions = run(AdaBatch(128, 300, every_epochs=1), 3)
    assert [d.batch_size for d in decisions] == [128, 256, 300, 300]
    per_example = [d.lr_factor / d.batch_size for d in decisions]
    assert [b / a for a, b in itertools.pairwise(per_example)] == pytest.approx([0.375] * 3)


def test_grow_instead_of_decay() -> None:
    """Start 128, rate 0.1, factor 5, cap 1000: 640 at 0.1, then 1000 at 0.03125, then 1000 at
    0.00625."""
    decisions = run(GrowInsteadOfDecay(128, 1000, milestones=[60, 120, 160], decay_factor=5), 165)
    events = [decisions[e] for e in (59, 60, 120, 160)]
    assert [d.batch_size for d in events] == [128, 640, 1000, 1000]
    assert [0.1 * d.lr_factor for d in events] == pytest.approx([0.1, 0.1, 0.03125, 0.00625])
    assert [e for e, d in enumerate(decisions) if d.reason] == [60, 120, 160]
    assert decisions[120].reason == "milestone 120: grow instead of decay"
    for passed, decision in enumerate(events):
        assert decision.lr_factor / decision.batch_size == pytest.approx(1 / (128 * 5**passed))


def test_grow_instead_of_decay_makes_up_for_rounding() -> None:
    """100 * 1.155 = 115.5: a batch of 115 with the rate of 115 / 115.5."""
    decision = run(GrowInsteadOfDecay(100, 1000, milestones=[1], decay_factor=1.155), 1)[-1]
    assert (decision.batch_size, decision.lr_factor) == (115, pytest.approx(115 / 115.5))


@pytest.mark.parametrize(
    "controller",
    [
        Warmup(128, 512),
        AdaBatch(128, 1024, every_epochs=2),
        GrowInsteadOfDecay(128, 1024, milestones=[2, 4]),
    ],
)
def test_saved_and_restored_continues_the_same(controller: BatchController) -> None:
    start = controller.state_dict()
    whole = run(controller, 6)
    controller.load_state_dict(start)
    run(controller, 3)
    middle = controller.state_dict()
    controller.load_state_dict(middle)
    assert not controller.is_due(progress(3)) or isinstance(controller, Warmup)
    assert [controller.update(progress(e)) for e in (4, 5, 6)] == whole[4:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBatch(0), "batch_size must be a whole number >= 1, got 0"),
        (lambda: Warmup(0, 128), "batch_size must be a whole number >= 1, got 0"),
        (lambda: Warmup(128, 64), "max_batch_size must be >= batch_size 128, got 64"),
        (
            lambda: Warmup(128, 128, warmup_epochs=-1),
            "warmup_epochs must be a finite number >= 0, got -1",
        ),
        (lambda: AdaBatch(128, 64), "max_batch_size must be >= batch_size 128, got 64"),
        (
            lambda: AdaBatch(128, 256, every_epochs=0),
            "every_epochs must be a whole number >= 1, got 0",
        ),
        (
            lambda: AdaBatch(128, 256, growth_factor=1),
            "growth_factor must be a finite number > 1, got 1",
        ),
        (lambda: AdaBatch(128, 256, lr_decay=0), "lr_decay must be a finite number > 0, got 0"),
        (
            lambda: GrowInsteadOfDecay(1, 2, milestones=[]),
            r"milestones must be one or more increasing.*got \[\]",
        ),
        (lambda: GrowInsteadOfDecay(1, 2, milestones=[3, 3]), r"increasing epochs, got \[3, 3\]"),
        (
            lambda: GrowInsteadOfDecay(1, 2, milestones=[0]),
            "milestones must be a whole number >= 1, got 0",
        ),
        (
            lambda: GrowInsteadOfDecay(1, 2, milestones=[1], decay_factor=1),
            "decay_factor must be a finite number > 1",
        ),
        (
            lambda: FixedBatch(128).update(progress(1, examples_per_epoch=100)),
            "<= the 100 training examples, got 128",
        ),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make()  # type: ignore[operator]


def test_warmup_rises_to_what_the_rule_makes_of_the_batch() -> None:
    """512 is four times 128: under the root the ramp goes from 1 to 2, half-way through its 2
    epochs it is at 1.5."""
    controller = Warmup(128, 512, warmup_epochs=2, lr_rule="sqrt")
    assert controller.decision.lr_factor == 1
    assert controller.update(progress(1)).lr_factor == 1.5
    assert controller.update(progress(2)).lr_factor == 2
    assert not controller.is_due(progress(3))
    assert Warmup(128, 512, warmup_epochs=0, lr_rule="none").decision.lr_factor == 1
    assert Warmup(128, 512, warmup_epochs=0, max_lr_factor=3).decision.lr_factor == 3
