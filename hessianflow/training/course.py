"""How far a run has come, and what has been done after its last update."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hessianflow.interfaces import Progress, ResizableBatches
from hessianflow.runs.rows import Record
from hessianflow.training.evaluate import Evaluation


@dataclass
class Counters:
    """The plain values of a run.

    Attributes:
        examples: trained so far.
        updates: optimizer steps so far.
        epoch: epochs completed.
        place: examples of the epoch under way that were trained.
        saved_at: `examples` at the last checkpoint.
        best: best evaluation accuracy so far.
        best_loss: lowest evaluation loss so far, where there is no accuracy.
        batch_cap: largest batch allowed since a divergence; None: no cap.
        cap_power: the learning rate goes with batch ^ cap_power where the cap holds it,
        cap_factor: and its factor is at most this.
        rollbacks: divergences rolled back.
        settled: updates after which everything that follows an update has been done, too.
    """

    examples: int = 0
    updates: int = 0
    epoch: int = 0
    place: int = 0
    saved_at: int = 0
    best: float | None = None
    best_loss: float | None = None
    batch_cap: int | None = None
    cap_power: float = 1.0
    cap_factor: float = math.inf
    rollbacks: int = 0
    settled: int = 0

    def is_best(self, accuracy: float | None, loss: float) -> bool:
        """Return whether the model is better than ever: by its accuracy, or by its loss where there
        is none; remembers it."""
        if accuracy is not None:
            is_best = self.best is None or accuracy > self.best
            self.best = accuracy if is_best else self.best
            return is_best
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        self.best_loss = loss if is_best else self.best_loss
        return is_best


@dataclass
class Done:
    """What was done after an update; after an error there, training goes on behind it.

    Attributes:
        place: updates made and epochs completed; that an epoch is over may be told after its last
            update.
        decided: whether the controller has been asked.
        remeasured: whether running statistics were, before that; None: nobody has looked yet.
        rows: of what was measured and decided, those that are not written yet.
        evaluation: at the end of an epoch; None where there is none.
        row: of the epoch.
        measurements: how many of them were made.
        stepped: whether the schedule has been told that the epoch is over.
    """

    place: tuple[int, int]
    decided: bool = False
    remeasured: bool | None = None
    rows: list[Record] = field(default_factory=list)
    evaluation: Evaluation | None = None
    row: dict[str, Any] | None = None
    measurements: int = 0
    stepped: bool = False


class Course:
    """Counts examples, updates and epochs.

    Args:
        data: the training data, which say how many examples make an epoch.
        epochs: passes over them.

    Attributes:
        counters: the counts; another object after a restart.
        epochs: passes over the data.
    """

    def __init__(self, data: ResizableBatches, epochs: int) -> None:
        self._data = data
        self._done: Done | None = None
        self.epochs = epochs
        self.counters = Counters()

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        counters = self.counters
        return Progress(
            counters.epoch,
            counters.examples,
            counters.updates,
            self._data.num_examples,
            self.epochs,
        )

    @property
    def is_between_epochs(self) -> bool:
        """Whether no example of the epoch under way has been trained."""
        return self.counters.place == 0

    @property
    def is_settled(self) -> bool:
        """Whether all that follows the last update has been done."""
        return self.counters.settled == self.counters.updates

    @property
    def is_unfinished(self) -> bool:
        """Whether anything of the run is still to be done."""
        return self.counters.epoch < self.epochs or not self.is_settled

    def count(self, examples: int, *, ends_epoch: bool) -> None:
        """Count one update on so many examples; `ends_epoch`: the data have no more of them."""
        counters = self.counters
        counters.examples += examples
        counters.place += examples
        counters.updates += 1
        if ends_epoch or counters.place >= self._data.num_examples:
            self.end_epoch()

    def end_epoch(self) -> None:
        """Count one epoch."""
        self.counters.epoch += 1
        self.counters.place = 0

    def settle(self) -> None:
        """Note that all that follows the last update has been done."""
        self.counters.settled = self.counters.updates

    def done(self) -> Done:
        """Return what has been done after the last update so far."""
        place = self.counters.updates, self.counters.epoch
        if self._done is None or self._done.place != place:
            self._done = Done(place)
        return self._done

    def forget(self) -> None:
        """Forget what was done after the last update: the state, or the world, is another."""
        self._done = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return asdict(self.counters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Earlier versions count examples alone, and every epoch has as many as the data.
        """
        epoch, place = divmod(state["examples"], self._data.num_examples)
        self.counters = Counters(**{"epoch": epoch, "place": place, **state})
