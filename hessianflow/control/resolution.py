"""Resolutions that change during training, with batch size and dropout in step.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092, part 2.

Training is divided into phases of constant learning rate. With resolutions r_1 < ... < r_m,

- "cyclic" divides every phase into m equal stages, from r_1 to r_m (the paper's method);
- "once" uses r_i in phase i, and the highest from phase m on;
- "uniform" divides the whole of training into m equal stages, whatever the phases.

The last stage always has the highest resolution. The learning rate does not follow the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from hessianflow.checks import check_choice, check_count, check_number
from hessianflow.interfaces.control import (
    NO_SIGNALS,
    BatchController,
    CurvatureReading,
    Decision,
    ForgetsReference,
    Progress,
)
from hessianflow.interfaces.errors import HessianFlowError

Schedule = Literal["cyclic", "once", "uniform"]


@dataclass(frozen=True)
class Level:
    """A resolution (side of the images in pixels), its batch size and its dropout probability."""

    resolution: int
    batch_size: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("resolution", self.resolution)
        check_count("batch_size", self.batch_size)
        check_number("dropout", self.dropout, low=0, high=1)


@dataclass(frozen=True)
class Stage:
    """Epochs [start, end) at one level; `phase` counts the learning-rate phases from 0."""

    start: int
    end: int
    phase: int
    level: Level


def resolution_stages(
    phase_ends: Sequence[int], levels: Sequence[Level], schedule: Schedule
) -> tuple[Stage, ...]:
    """Return the stages of a run, in order and without gaps from epoch 0 to the last phase end.

    Args:
        phase_ends: Increasing epochs at which the learning rate falls, the last of which is the
            end of training.
        levels: Levels from the lowest resolution to the highest.
        schedule: Order of the resolutions, see the module.

    Raises:
        HessianFlowError: Epochs or resolutions do not increase, a value is out of its bounds, or a
            phase has fewer epochs than it needs stages.
    """
    ends = [check_count("phase_ends", end) for end in phase_ends]
    if not ends or any(b <= a for a, b in pairwise(ends)):
        raise HessianFlowError(
            f"phase_ends must be one or more increasing epochs, got {list(phase_ends)}"
        )
    resolutions = [level.resolution for level in levels]
    if not resolutions or any(b <= a for a, b in pairwise(resolutions)):
        raise HessianFlowError(
            f"levels must have one or more increasing resolutions, got {resolutions}"
        )
    check_choice("schedule", schedule, get_args(Schedule))
    phases = list(pairwise([0, *ends]))
    if schedule == "cyclic":
        cuts = [(a, b, level) for start, end in phases for a, b, level in _cut(start, end, levels)]
    elif schedule == "once":
        if len(phases) < len(levels):
            raise HessianFlowError(
                f"phase_ends must give {len(levels)} phases, one a resolution, got {len(phases)}"
            )
        cuts = [(a, b, levels[min(index, len(levels) - 1)]) for index, (a, b) in enumerate(phases)]
    else:
        cuts = _cut(0, ends[-1], levels)
    return tuple(Stage(a, b, sum(end <= a for end in ends), level) for a, b, level in cuts)


def stage_at(stages: Sequence[Stage], epoch: int) -> Stage:
    """Return the stage of the epoch after `epoch` completed ones, and at the end the last stage."""
    return next((stage for stage in stages if epoch < stage.end), stages[-1])


class ProgressiveResolution:
    """A controller whose batch size follows the resolution in use.

    A batch transform resizes the images. The controller's sizes are those at the highest
    resolution; at another one they are multiplied by that level's batch size over the last level's,
    rounded, and limited to the training set. The learning rate does not follow. At a change of
    resolution a controller with a `forget_reference()` forgets what it measured, because the loss
    changes there.

    Args:
        controller: Controller that decides everything else.
        stages: Stages from :func:`resolution_stages`. The transform and the dropout follow
            :func:`stage_at`.
    """

    def __init__(self, controller: BatchController, stages: Sequence[Stage]) -> None:
        if not stages:
            raise HessianFlowError("stages must hold at least one stage, got none")
        if not isinstance(controller, BatchController):
            raise HessianFlowError(
                "controller must be one, such as FixedBatch(128), got a"
                f" {type(controller).__name__}"
            )
        self.controller = controller
        self.stages = tuple(stages)
        self._epoch = 0
        self._reason = ""
        self._largest: int | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Name the signals that the controller wants."""
        return self.controller.needs

    @property
    def decision(self) -> Decision:
        """Return the controller's setting with the batch size of the resolution."""
        decision = self.controller.decision
        size = self._scaled(decision.batch_size, stage_at(self.stages, self._epoch))
        return replace(decision, batch_size=size, reason=self._reason)

    def is_due(self, progress: Progress) -> bool:
        """Return whether the controller is due or the resolution changes."""
        return self.controller.is_due(progress) or self._changes(progress)

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision:
        """Ask the controller if it is due, and return the setting at the resolution from now on."""
        reasons = []
        if self.controller.is_due(progress):
            reasons.append(self.controller.update(progress, reading, signals).reason)
        if self._changes(progress):
            stage = stage_at(self.stages, progress.epoch)
            reasons.append(f"resolution {stage.level.resolution} from epoch {stage.start} on")
            if isinstance(self.controller, ForgetsReference):
                self.controller.forget_reference()
        self._epoch = progress.epoch
        self._reason = "; ".join(filter(None, reasons))
        self._largest = progress.examples_per_epoch
        return self.decision

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state, and the last epoch seen."""
        own = {"epoch": self._epoch, "reason": self._reason, "largest": self._largest}
        return {**own, "controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._epoch = state["epoch"]
        self._reason = state["reason"]
        self._largest = state["largest"]
        self.controller.load_state_dict(state["controller"])

    def _changes(self, progress: Progress) -> bool:
        before = stage_at(self.stages, self._epoch).level
        return before.resolution != stage_at(self.stages, progress.epoch).level.resolution

    def _scaled(self, batch_size: int, stage: Stage) -> int:
        size = max(1, round(batch_size * stage.level.batch_size / self.stages[-1].level.batch_size))
        return min(size, self._largest or size)  # before the first update the set is unknown


def _cut(start: int, end: int, levels: Sequence[Level]) -> list[tuple[int, int, Level]]:
    length = end - start
    count = len(levels)
    if length < count:
        raise HessianFlowError(
            f"phase_ends must leave {count} epochs for {count} resolutions, got {start} to {end}"
        )
    edges = [start + round(length * index / count) for index in range(count + 1)]
    return [(a, b, level) for (a, b), level in zip(pairwise(edges), levels, strict=True)]
