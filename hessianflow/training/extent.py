"""The length of a run and of its epochs, in passes over the data, in examples or in updates."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from hessianflow.checks import check_count
from hessianflow.interfaces import UNKNOWN, HessianFlowError, Progress

Unit = Literal["epochs", "updates", "examples"]


def known(examples: int) -> int | None:
    """Return a number of examples, or None where nobody knows it."""
    if examples == UNKNOWN:
        return None
    return examples


@dataclass(frozen=True)
class Every:
    """The length of an epoch of a run, where that is not one pass over the training data.

    Everything that is done after an epoch (evaluation, checkpoint, reading of the curvature,
    decision, step of a schedule that counts epochs) is done after this many examples or updates. A
    run of one pass can so be divided into many epochs.

    Attributes:
        examples: examples of an epoch. The batch that reaches a multiple of it ends an epoch.
        updates: optimizer steps of an epoch.

    Raises:
        HessianFlowError: not exactly one of them is given, or it is no whole number of at least 1.
    """

    examples: int | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        if (self.examples is None) == (self.updates is None):
            raise HessianFlowError(
                "Every must have either examples or updates, as Every(updates=500), got"
                f" {self.examples!r} examples and {self.updates!r} updates"
            )
        check_count("Every.examples", self.examples, none="as many as the updates take")
        check_count("Every.updates", self.updates, none="as many as the examples need")


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        examples: examples trained.
        updates: optimizer steps taken.
        place: examples trained in the current epoch.
        steps: optimizer steps taken in the current epoch.
    """

    epoch: int = 0
    examples: int = 0
    updates: int = 0
    place: int = 0
    steps: int = 0

    def next_epoch(self) -> "Position":
        """Return this position as the beginning of the next epoch."""
        return replace(self, epoch=self.epoch + 1, place=0, steps=0)


@dataclass(frozen=True)
class Extent:
    """When the epochs of a run end, and when the run does: at the first of its limits.

    Attributes:
        num_examples: examples of one pass over the data; UNKNOWN: only the data know its end.
        epochs: epochs of the run; None: another limit ends it.
        max_updates: optimizer steps after which the run ends.
        max_examples: examples after which the run ends, with the batch that reaches them.
        every: the length of an epoch; None: one pass over the data.

    Raises:
        HessianFlowError: there is no limit, or one is no whole number of at least 1.
    """

    num_examples: int
    epochs: int | None = None
    max_updates: int | None = None
    max_examples: int | None = None
    every: Every | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "max_updates", "max_examples"):
            check_count(name, getattr(self, name), none="another limit")
        if self.every is not None and not isinstance(self.every, Every):
            raise HessianFlowError(
                "every must be a hf.training.Every, as Every(updates=500), got a"
                f" {type(self.every).__name__}"
            )
        if not self._limits:
            raise HessianFlowError("a run needs an end: pass epochs, max_updates or max_examples")

    @property
    def settings(self) -> dict[str, int | None]:
        """The limits of the run, and the length of its epochs, as plain values."""
        limits = {"max_updates": self.max_updates, "max_examples": self.max_examples}
        every: dict[str, int | None] = {}
        if self.every is not None:
            every = {f"every_{unit}": length for unit, length in vars(self.every).items()}
        stated = {name: value for name, value in (limits | every).items() if value is not None}
        return {"epochs": self.epochs, **stated}

    @property
    def examples_per_epoch(self) -> int:
        """Examples of an epoch; UNKNOWN where updates or the end of the data decide."""
        if self.every is None:
            return self.num_examples
        return self.every.examples or UNKNOWN

    def total(self, unit: Unit) -> int | None:
        """Return the length of the whole run in a unit; None where that depends on batch sizes."""
        totals = [self._converted(limit, of, unit) for of, limit in self._limits.items()]
        if None in totals:
            return None
        return min(total for total in totals if total is not None)

    @property
    def _limits(self) -> dict[Unit, int]:
        """The limits that are stated."""
        limits: dict[Unit, int | None] = {
            "epochs": self.epochs,
            "updates": self.max_updates,
            "examples": self.max_examples,
        }
        return {unit: limit for unit, limit in limits.items() if limit is not None}

    @property
    def _epoch_in(self) -> dict[Unit, int | None]:
        """The length of an epoch in each unit; None where that depends on batch sizes."""
        updates: int | None = None
        if self.every is not None:
            updates = self.every.updates
        return {"updates": updates, "examples": known(self.examples_per_epoch)}

    def _converted(self, limit: int, of: Unit, to: Unit) -> int | None:
        """Return a limit that is stated in one unit in another; None where that is impossible."""
        if of == to:
            return limit
        if to == "epochs":
            length = self._epoch_in[of]
            return length and math.ceil(limit / length)
        if of == "epochs":
            length = self._epoch_in[to]
            return length and limit * length
        return None

    def steps(self, batch_size: int) -> int:
        """Return the updates of the whole run if the batch size stays."""
        per_epoch = self._epoch_in["updates"] or -(-self.examples_per_epoch // batch_size)
        limits = [self.max_updates]
        if self.max_examples is not None:
            limits.append(-(-self.max_examples // batch_size))
        if self.epochs is not None:
            limits.append(self.epochs * per_epoch)
        return min(limit for limit in limits if limit is not None)

    def after(self, position: Position, examples: int, *, data_ended: bool = False) -> Position:
        """Return the position after one more update on `examples`."""
        now = Position(
            position.epoch,
            position.examples + examples,
            position.updates + 1,
            position.place + examples,
            position.steps + 1,
        )
        if self.every is None:
            ends = data_ended or now.place >= self.num_examples
        elif self.every.updates is not None:
            ends = now.steps >= self.every.updates
        else:
            # Multiples do not drift, though a batch may reach beyond one.
            assert self.every.examples is not None
            ends = now.examples // self.every.examples > now.epoch
        # The last epoch of a run is shorter where the run ends within it.
        if ends or self._is_at_limit(now):
            return now.next_epoch()
        return now

    def is_over(self, position: Position) -> bool:
        """Return whether the run has reached one of its limits."""
        if self.epochs is not None and position.epoch >= self.epochs:
            return True
        return self._is_at_limit(position)

    def progress(self, position: Position) -> Progress:
        """Return the position as controllers are told."""
        passed: float | None = None
        if self.examples_per_epoch == UNKNOWN:
            passed = float(position.epoch)
            if self.every is not None and self.every.updates is not None:
                passed += position.steps / self.every.updates
        done: float | None = None
        if self.max_updates is not None or self.max_examples is not None:
            done = self._fraction(position, passed)
        return Progress(
            position.epoch,
            position.examples,
            position.updates,
            self.examples_per_epoch,
            self.total("epochs"),
            passed,
            done,
        )

    def _fraction(self, position: Position, passed: float | None) -> float:
        """Return the share of the run that is over, by the limit that is nearest."""
        if passed is None:
            passed = position.examples / self.examples_per_epoch
        # The data may have ended an epoch before their number of examples.
        limits = (
            (max(passed, position.epoch), self.epochs),
            (position.updates, self.max_updates),
            (position.examples, self.max_examples),
        )
        return min(1.0, max(done / limit for done, limit in limits if limit is not None))

    def _is_at_limit(self, position: Position) -> bool:
        updates = self.max_updates
        examples = self.max_examples
        return (updates is not None and position.updates >= updates) or (
            examples is not None and position.examples >= examples
        )

    def _of_updates(self) -> int | None:
        """Return the epochs that `max_updates` make, where epochs are counted in updates."""
        if self.max_updates is None or self.every is None or self.every.updates is None:
            return None
        return math.ceil(self.max_updates / self.every.updates)

    def _of_examples(self) -> int | None:
        """Return the epochs that `max_examples` make, where their examples are known."""
        if self.max_examples is None or self.examples_per_epoch == UNKNOWN:
            return None
        return math.ceil(self.max_examples / self.examples_per_epoch)
