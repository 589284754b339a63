"""Resolution over training time: cyclic, once, or uniform, with batch size and dropout in step.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed training",
arXiv:2509.26092, part 2.

Training is cut into phases of constant learning rate. With resolutions r_1 < ... < r_m:

- "cyclic": every phase is cut into m equal stages, from r_1 to r_m (the paper's method);
- "once": phase i uses r_i, the highest from phase m on;
- "uniform": the whole of training is cut into m equal stages, whatever the phases.

The last stage always has the highest resolution. The learning rate does not follow the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from hessianflow.control.checks import check_count, check_number
from hessianflow.control.controller import Controller, ControllerState, Measured
from hessianflow.interfaces import HessianFlowError

Schedule = Literal["cyclic", "once", "uniform"]


@dataclass(frozen=True)
class Level:
    """What goes with one resolution: side of the images in pixels, examples per step, dropout probability."""

    resolution: int
    batch_size: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Epochs [start, end) at one level, within learning-rate phase `phase` (counted from 0 at its first epoch)."""

    start: int
    end: int
    phase: int
    level: Level


def resolution_stages(phase_ends: Sequence[int], levels: Sequence[Level], schedule: Schedule) -> tuple[Stage, ...]:
    """The stages of a run, in order and without gaps from epoch 0 to the last phase end.

    Args:
        phase_ends: epochs at which the learning rate falls, and the last one, where training ends; increasing.
        levels: from the lowest resolution to the highest.
        schedule: see the module.

    Raises:
        HessianFlowError: epochs or resolutions do not increase, a value is out of its bounds, or a phase has fewer
            epochs than it needs stages.
    """
    ends = [check_count("phase_ends", end) for end in phase_ends]
    if not ends or any(b <= a for a, b in pairwise(ends)):
        raise HessianFlowError(f"phase_ends must be one or more increasing epochs, got {list(phase_ends)}")
    _check_levels(levels)
    phases = list(pairwise([0, *ends]))
    if schedule == "cyclic":
        cuts = [(a, b, level) for start, end in phases for a, b, level in _cut(start, end, levels)]
    elif schedule == "once":
        if len(phases) < len(levels):
            raise HessianFlowError(f"phase_ends must give {len(levels)} phases, one a resolution, got {len(phases)}")
        cuts = [(a, b, levels[min(index, len(levels) - 1)]) for index, (a, b) in enumerate(phases)]
    elif schedule == "uniform":
        cuts = _cut(0, ends[-1], levels)
    else:
        raise HessianFlowError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    return tuple(Stage(a, b, sum(end <= a for end in ends), level) for a, b, level in cuts)


def stage_at(stages: Sequence[Stage], epoch: int) -> Stage:
    """The stage that the epoch after `epoch` completed ones belongs to; the last one from its start on."""
    return next((stage for stage in stages if epoch < stage.end), stages[-1])


class ProgressiveResolution(Controller[ControllerState]):
    """Sets the batch size that goes with the resolution of the day; the images are resized by a batch transform.

    The transform, and whoever sets the dropout, reads :func:`stage_at` with the same stages.

    Args:
        stages: from :func:`resolution_stages`.
        adversarial_share: share of each batch made adversarial, in [0, 1].

    Raises:
        HessianFlowError: no stage, or the share is out of its bounds.
    """

    def __init__(self, stages: Sequence[Stage], *, adversarial_share: float = 0.0) -> None:
        if not stages:
            raise HessianFlowError("stages must hold at least one stage, got none")
        self.stages = tuple(stages)
        share = check_number("adversarial_share", adversarial_share, low=0, high=1)
        largest = max(stage.level.batch_size for stage in stages)
        super().__init__(ControllerState(stages[0].level.batch_size, adversarial_share=share), largest)

    def _decide(self, measured: Measured, /) -> str:
        stage = stage_at(self.stages, measured.progress.epoch)
        if stage.level.batch_size == self._state.batch_size:
            return ""
        self._state.batch_size = stage.level.batch_size
        return f"resolution {stage.level.resolution} from epoch {stage.start} on"


def _cut(start: int, end: int, levels: Sequence[Level]) -> list[tuple[int, int, Level]]:
    length, count = end - start, len(levels)
    if length < count:
        raise HessianFlowError(f"phase_ends must leave {count} epochs for {count} resolutions, got {start} to {end}")
    edges = [start + round(length * index / count) for index in range(count + 1)]
    return [(a, b, level) for (a, b), level in zip(pairwise(edges), levels, strict=True)]


def _check_levels(levels: Sequence[Level]) -> None:
    for level in levels:
        check_count("resolution", level.resolution)
        check_count("batch_size", level.batch_size)
        check_number("dropout", level.dropout, low=0, high=1)
    resolutions = [level.resolution for level in levels]
    if not resolutions or any(b <= a for a, b in pairwise(resolutions)):
        raise HessianFlowError(f"levels must have one or more increasing resolutions, got {resolutions}")
