"""The schedule set by hand, against its own table."""

import pytest

from hessianflow.control import TimedSchedule
from hessianflow.interfaces import Decision, HessianFlowError, Progress

STAGES = [(2, 256), (4, 512), (8, 1024)]


def at(controller: TimedSchedule, epochs: float) -> Decision:
    return controller.update(Progress(int(epochs), round(epochs * 10_000), 0, 10_000, 24))


def test_sizes_and_rates_by_epoch() -> None:
    """Rate over batch stays until epoch 8; at epoch 16 half of the 16 epochs of decay are left, at
    24 nothing."""
    controller = TimedSchedule(128, STAGES, decay_from=8)
    assert controller.decision == Decision(128)
    assert [at(controller, e).batch_size for e in (1, 2, 3, 4, 7, 8, 20)] == [
        128,
        256,
        256,
        512,
        512,
        1024,
        1024,
    ]
    controller = TimedSchedule(128, STAGES, decay_from=8)
    assert [at(controller, e).lr_factor for e in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert at(controller, 16).lr_factor == 4
    assert at(controller, 17.6).lr_factor == pytest.approx(8 * 6.4 / 16)
    assert at(controller, 24).lr_factor == 0


def test_every_change_has_a_reason() -> None:
    controller = TimedSchedule(128, STAGES, decay_from=8)
    assert [at(controller, e).reason for e in (1, 2, 9)] == [
        "",
        "planned for epoch 2",
        "planned for epoch 9",
    ]
    assert at(controller, 10).reason == "planned decay from epoch 8 on"
    assert at(controller, 10).reason == ""


def test_due_after_every_epoch_and_every_update_of_the_decay() -> None:
    controller = TimedSchedule(128, STAGES, decay_from=8)
    at(controller, 3)
    assert not controller.is_due(Progress(3, 35_000, 0, 10_000, 24))
    assert controller.is_due(Progress(4, 40_000, 0, 10_000, 24))
    at(controller, 9)
    assert controller.is_due(Progress(9, 90_128, 0, 10_000, 24))


def test_no_stages_and_no_decay_is_a_fixed_batch() -> None:
    controller = TimedSchedule(32, [])
    assert [at(controller, e) for e in (1, 12, 24)] == [Decision(32)] * 3


def test_continues_from_its_state() -> None:
    first, second = (TimedSchedule(128, STAGES, decay_from=8) for _ in range(2))
    at(first, 4)
    second.load_state_dict(first.state_dict())
    assert second.decision == first.decision
    assert at(second, 16) == at(first, 16)


@pytest.mark.parametrize(
    ("stages", "decay_from", "message"),
    [
        ([(4, 256), (2, 512)], None, r"stages must have increasing epochs, got \[4, 2\]"),
        ([(0, 256)], None, "stages epochs must be a whole number >= 1, got 0"),
        ([(1, 0)], None, "stages sizes must be a whole number >= 1, got 0"),
        ([], -1, "decay_from must be a finite number >= 0, got -1"),
    ],
)
def test_bad_plans_are_refused(
    stages: list[tuple[int, int]], decay_from: float | None, message: str
) -> None:
    with pytest.raises(HessianFlowError, match=message):
        TimedSchedule(128, stages, decay_from=decay_from)


def test_a_size_beyond_the_data_is_refused() -> None:
    with pytest.raises(
        HessianFlowError, match="max_batch_size must be <= the 1000 training examples, got 1024"
    ):
        TimedSchedule(128, STAGES).update(Progress(1, 1000, 0, 1000, 24))


def test_another_rule_scales_the_rate_and_the_decay_stays() -> None:
    """Batches 2, 4, 8 times as large: their roots; at epoch 16 half of that is left."""
    controller = TimedSchedule(128, STAGES, decay_from=8, lr_rule="sqrt")
    assert [at(controller, e).lr_factor for e in (1, 2, 4)] == pytest.approx([1, 2**0.5, 2])
    assert at(controller, 16).lr_factor == pytest.approx(8**0.5 / 2)
    capped = TimedSchedule(128, STAGES, max_lr_factor=3)
    assert [at(capped, e).lr_factor for e in (2, 4, 8)] == [2, 3, 3]
    with pytest.raises(
        HessianFlowError, match="lr_rule must be one of linear, sqrt, none, got 'cube'"
    ):
        TimedSchedule(128, STAGES, lr_rule="cube")  # type: ignore[arg-type]
