"""Progressive resolution against the published stage tables."""

from collections.abc import Callable

import pytest

from hessianflow.control import (
    ABS,
    FixedBatch,
    Level,
    ProgressiveResolution,
    Stage,
    resolution_stages,
    stage_at,
)
from hessianflow.control.rate_rule import RateRule
from hessianflow.interfaces import CurvatureReading, Decision, HessianFlowError, Progress

CIFAR = [Level(24, 600, 0.1), Level(32, 560, 0.2)]
IMAGENET = [Level(160, 2330, 0.1), Level(224, 1110, 0.2), Level(288, 740, 0.3)]


def test_cyclic_stages_of_the_cifar_setting() -> None:
    """Learning rate 0.2 * 0.1^phase; 140 epochs."""
    stages = resolution_stages([80, 120, 140], CIFAR, "cyclic")
    assert [stage.end for stage in stages] == [40, 80, 100, 120, 130, 140]
    table = {
        0: (0, 24),
        39: (0, 24),
        40: (0, 32),
        80: (1, 24),
        119: (1, 32),
        120: (2, 24),
        130: (2, 32),
        139: (2, 32),
    }
    for epoch, (phase, resolution) in table.items():
        stage = stage_at(stages, epoch)
        assert (stage.phase, stage.level.resolution) == (phase, resolution)


def test_cyclic_stages_of_the_imagenet_setting() -> None:
    stages = resolution_stages([60, 90, 105], IMAGENET, "cyclic")
    assert [stage.end for stage in stages] == [20, 40, 60, 70, 80, 90, 95, 100, 105]
    assert [stage.level.resolution for stage in stages] == [160, 224, 288] * 3


def test_once_rises_at_the_milestones_and_stays() -> None:
    stages = resolution_stages([80, 120, 140], CIFAR, "once")
    assert [(s.start, s.end, s.phase, s.level.resolution) for s in stages] == [
        (0, 80, 0, 24),
        (80, 120, 1, 32),
        (120, 140, 2, 32),
    ]


def test_uniform_ignores_the_phases() -> None:
    stages = resolution_stages([60, 90, 105], IMAGENET, "uniform")
    assert [(s.start, s.end, s.phase) for s in stages] == [(0, 35, 0), (35, 70, 0), (70, 105, 1)]


@pytest.mark.parametrize("schedule", ["cyclic", "once", "uniform"])
def test_stages_cover_training_and_end_at_the_highest(schedule: str) -> None:
    stages = resolution_stages([7, 11, 18], IMAGENET, schedule)  # type: ignore[arg-type]
    assert [stage.start for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert (stages[-1].end, stages[-1].level.resolution) == (18, 288)
    assert stage_at(stages, 18) == stage_at(stages, 99) == stages[-1]


def test_one_level_is_full_resolution_throughout() -> None:
    stages = resolution_stages([10], [Level(32, 128)], "cyclic")
    assert stages == (Stage(0, 10, 0, Level(32, 128)),)
    controller = ProgressiveResolution(FixedBatch(128), stages)
    for epoch in range(1, 11):
        assert controller.update(Progress(epoch, 0, 0, 50_000, 10)).reason == ""


def test_controller_follows_the_stages() -> None:
    stages = resolution_stages([80, 120, 140], CIFAR, "cyclic")
    controller = ProgressiveResolution(FixedBatch(560), stages)
    assert controller.decision == Decision(600)
    assert controller.needs == frozenset()
    changes = {}
    for epoch in range(1, 141):
        progress = Progress(epoch, 0, 0, 50_000, 140)
        if not controller.is_due(progress):
            continue
        decision = controller.update(progress)
        assert decision.lr_factor == 1
        changes[epoch] = decision.batch_size, decision.reason
    assert changes == {
        40: (560, "resolution 32 from epoch 40 on"),
        80: (600, "resolution 24 from epoch 80 on"),
        100: (560, "resolution 32 from epoch 100 on"),
        120: (600, "resolution 24 from epoch 120 on"),
        130: (560, "resolution 32 from epoch 130 on"),
    }
    again = ProgressiveResolution(FixedBatch(560), stages)
    again.load_state_dict(controller.state_dict())
    assert again.decision == controller.decision


def test_absa_takes_a_new_reference_at_every_resolution() -> None:
    """Without it, the fall from 100 to 30 at epoch 2, where the resolution changes, would count as
    a decay."""
    stages = resolution_stages([4], [Level(24, 64), Level(32, 32)], "cyclic")
    controller = ProgressiveResolution(RateRule(ABS(100, 400, patience=None), "sqrt"), stages)
    assert controller.needs == {"eigenvalue"}
    sizes = [controller.decision.batch_size]
    for epoch, eigenvalue in enumerate([100.0, 90.0, 30.0, 14.0], start=1):
        reading = CurvatureReading(eigenvalue, 0.0, 1, True)
        progress = Progress(epoch, 0, 0, 50_000, 5)
        assert controller.is_due(progress)
        decision = controller.update(progress, reading)
        sizes.append(decision.batch_size)
    assert sizes == [200, 200, 100, 100, 200], "twice the controller's size at the low resolution"
    assert decision.reason == "eigenvalue fell from 30 to 14 (<= 1/2)"
    assert decision.lr_factor == pytest.approx(2**0.5)


def test_the_batch_is_never_more_than_the_training_set() -> None:
    controller = ProgressiveResolution(
        FixedBatch(70), resolution_stages([2, 4], [Level(8, 2), Level(9, 1)], "cyclic")
    )
    assert controller.decision.batch_size == 140
    assert controller.update(Progress(2, 0, 0, 100, 4)).batch_size == 100


def test_a_controller_without_memory_needs_no_method_for_it() -> None:
    stages = resolution_stages([2], CIFAR, "cyclic")
    for controller in (RateRule(FixedBatch(560), "sqrt"), FixedBatch(560)):
        assert (
            ProgressiveResolution(controller, stages)
            .update(Progress(1, 0, 0, 50_000, 2))
            .batch_size
            == 560
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: resolution_stages([], CIFAR, "cyclic"),
            r"phase_ends must be one or more increasing epochs, got \[\]",
        ),
        (lambda: resolution_stages([5, 5], CIFAR, "cyclic"), r"increasing epochs, got \[5, 5\]"),
        (
            lambda: resolution_stages([0], CIFAR, "cyclic"),
            "phase_ends must be a whole number >= 1, got 0",
        ),
        (
            lambda: resolution_stages([1], CIFAR, "cyclic"),
            "must leave 2 epochs for 2 resolutions, got 0 to 1",
        ),
        (
            lambda: resolution_stages([9], CIFAR, "once"),
            "phase_ends must give 2 phases, one a resolution, got 1",
        ),
        (
            lambda: resolution_stages([9], CIFAR, "sine"),
            "must be one of cyclic, once, uniform, got 'sine'",
        ),
        (
            lambda: resolution_stages([9], [], "cyclic"),
            r"one or more increasing resolutions, got \[\]",
        ),
        (
            lambda: resolution_stages([9], CIFAR[::-1], "cyclic"),
            r"increasing resolutions, got \[32, 24\]",
        ),
        (
            lambda: resolution_stages([9], [Level(0, 1)], "cyclic"),
            "resolution must be a whole number >= 1, got 0",
        ),
        (
            lambda: resolution_stages([9], [Level(1, 0)], "cyclic"),
            "batch_size must be a whole number >= 1, got 0",
        ),
        (
            lambda: resolution_stages([9], [Level(1, 1, 2)], "cyclic"),
            "dropout must be a finite number >= 0 and <= 1",
        ),
        (
            lambda: ProgressiveResolution(FixedBatch(1), []),
            "stages must hold at least one stage, got none",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make()
