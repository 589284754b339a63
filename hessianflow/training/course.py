"""The progress of a run, and the work already done after its last update."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

from hessianflow.interfaces import Progress
from hessianflow.runs.rows import Record
from hessianflow.training.evaluate import Evaluation
from hessianflow.training.extent import Extent, Position

_place_of = attrgetter(*Position._fields)


@dataclass
class Counters:
    """The counts of a run, for its checkpoints: examples, updates, epochs completed, and these.

    Attributes:
        place: examples trained in the current epoch.
        steps: updates of the current epoch.
        passes: passes over the data completed.
        read: examples trained in the current pass.
        saved_at: `examples` at the last checkpoint.
        best: best evaluation accuracy so far.
        best_loss: lowest evaluation loss so far, where there is no accuracy.
        best_figure: best value so far of the figure that :class:`Best` names.
        waited: epochs since the best one.
        ended_early: whether the run ended before its limits because no epoch was better.
        batch_cap: largest batch allowed since a divergence; None: no cap.
        cap_power: power of the batch by which the cap lowers the rate factor.
        cap_factor: largest rate factor under the cap.
        rollbacks: divergences rolled back.
        settled: `updates` when all that follows an update was last done.
    """

    examples: int = 0
    updates: int = 0
    epoch: int = 0
    place: int = 0
    steps: int = 0
    passes: int = 0
    read: int = 0
    saved_at: int = 0
    best: float | None = None
    best_loss: float | None = None
    best_figure: float | None = None
    waited: int = 0
    ended_early: bool = False
    batch_cap: int | None = None
    cap_power: float = 1.0
    cap_factor: float = math.inf
    rollbacks: int = 0
    settled: int = 0

    @property
    def position(self) -> Position:
        """How far the run has come."""
        return Position(*_place_of(self))

    def move_to(self, position: Position) -> None:
        """Set the counters to those of `position`."""
        for name, value in zip(Position._fields, position, strict=True):
            setattr(self, name, value)

    def is_best(self, accuracy: float | None, loss: float | None) -> bool:
        """Remember and return whether accuracy, or loss where there is none, is the best so far."""
        if accuracy is not None:
            if self.best is not None and not accuracy > self.best:
                return False
            self.best = accuracy
            return True
        if loss is None or not math.isfinite(loss):
            return False
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_loss = loss
        return True


@dataclass
class Done:
    """The work already done after an update; after an error, training continues behind it.

    Attributes:
        place: updates made and epochs completed; the data may end an epoch after its last update.
        decided: whether the controller has been asked.
        remeasured: whether running statistics were measured again; None: not known yet.
        rows: rows of readings and decisions that are not written yet.
        row: the row of the epoch.
        measurements: the number of measurements made.
        figures: the figures of the reading and of the measurements.
        stepped: whether the schedule has been told that the epoch is over.
    """

    place: tuple[int, int]
    decided: bool = False
    remeasured: bool | None = None
    rows: list[Record] = field(default_factory=list)
    evaluation: Evaluation | None = None
    row: dict[str, Any] | None = None
    measurements: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    stepped: bool = False


class Course:
    """Counts examples, updates and epochs; the `counters` are another object after a restart."""

    def __init__(self, extent: Extent) -> None:
        self._done: Done | None = None
        self.extent = extent
        self.counters = Counters()

    @property
    def progress(self) -> Progress:
        """How far the run has come, in the form that controllers receive."""
        progress = self.extent.progress(self.counters.position)
        if self.counters.ended_early:
            return replace(progress, done=1.0)
        return progress

    @property
    def is_between_epochs(self) -> bool:
        """Whether no example of the current epoch has been trained."""
        return self.counters.place == 0

    @property
    def is_settled(self) -> bool:
        """Whether all that follows the last update has been done."""
        return self.counters.settled == self.counters.updates

    @property
    def is_over(self) -> bool:
        """Whether the last update of the run has been made."""
        return self.counters.ended_early or self.extent.is_over(self.counters.position)

    @property
    def is_unfinished(self) -> bool:
        """Whether the run still has work to do."""
        return not self.is_over or not self.is_settled

    def count(self, examples: int, *, data_ended: bool) -> None:
        """Count one update; `data_ended` says that it was the last one of a pass."""
        position = self.counters.position
        self.counters.move_to(self.extent.after(position, examples, data_ended=data_ended))

    def end_pass(self) -> bool:
        """Count a pass that ended with the previous update; return whether an epoch ended, too."""
        before = self.counters.epoch
        self.counters.move_to(self.extent.after_pass(self.counters.position))
        return self.counters.epoch > before

    def settle(self) -> None:
        """Note that all that follows the last update has been done."""
        self.counters.settled = self.counters.updates

    def done(self) -> Done:
        """Return the work done after the last update so far."""
        place = (self.counters.updates, self.counters.epoch)
        if self._done is None or self._done.place != place:
            self._done = Done(place)
        return self._done

    def forget(self) -> None:
        """Forget the work done after the last update, when state or world change."""
        self._done = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain values."""
        return asdict(self.counters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the counters of :meth:`state_dict`."""
        # Checkpoints without these counters come from runs whose epochs are passes.
        passes = {"passes": state.get("epoch", 0), "read": state.get("place", 0)}
        self.counters = Counters(**(passes | dict(state)))
