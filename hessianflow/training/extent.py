"""The length of a run and of its epochs, in passes over the data, in examples or in updates."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from hessianflow.checks import check_count
from hessianflow.interfaces import UNKNOWN, HessianFlowError, Progress
from hessianflow.structure import article

Unit = Literal["epochs", "updates", "examples"]
_Limit = Literal["passes", "updates", "examples"]


def known(examples: int) -> int | None:
    """Return a number of examples, or None if it is unknown."""
    if examples == UNKNOWN:
        return None
    return examples


@dataclass(frozen=True)
class Every:
    """The length of an epoch of a run, if that is not one pass over the training data.

    Everything that happens after an epoch (evaluation, record, checkpoint, reading of the
    curvature, decision, step of a schedule that counts epochs) happens after this many examples or
    updates, and records and controllers count each such stretch as an epoch. A single pass can
    therefore be divided into many epochs.

    Attributes:
        examples: examples of an epoch. The batch that reaches a multiple of it ends an epoch.
        updates: optimizer steps of an epoch.

    Raises:
        HessianFlowError: neither or both are given, or the one given is not a whole number of at
            least 1.
    """

    examples: int | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        if (self.examples is None) == (self.updates is None):
            raise HessianFlowError(
                f"Every must have either examples or updates, got {self.examples!r} examples and"
                f" {self.updates!r} updates: pass one, as in Every(updates=500)"
            )
        check_count("Every.examples", self.examples, none="as many as the updates take")
        check_count("Every.updates", self.updates, none="as many as the examples need")


class Position(NamedTuple):
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        examples: examples trained.
        updates: optimizer steps taken.
        place: examples trained in the current epoch.
        steps: optimizer steps taken in the current epoch.
        passes: passes over the data completed.
        read: examples trained in the current pass.
    """

    epoch: int = 0
    examples: int = 0
    updates: int = 0
    place: int = 0
    steps: int = 0
    passes: int = 0
    read: int = 0

    def next_epoch(self) -> "Position":
        """Return this position as the beginning of the next epoch."""
        return self._replace(epoch=self.epoch + 1, place=0, steps=0)

    def next_pass(self) -> "Position":
        """Return this position as the beginning of the next pass."""
        return self._replace(passes=self.passes + 1, read=0)


@dataclass(frozen=True)
class Extent:
    """The ends of the epochs of a run, and the end of the run at the first of its limits.

    Attributes:
        num_examples: examples of one pass over the data; UNKNOWN if only the data know its end.
        passes: passes over the data after which the run ends; None if another limit ends it.
        max_updates: optimizer steps after which the run ends.
        max_examples: examples after which the run ends; the batch that reaches them is the last.
        every: the length of an epoch; None for one pass over the data.

    Raises:
        HessianFlowError: there is no limit, or a limit is not a whole number of at least 1.
    """

    num_examples: int
    passes: int | None = None
    max_updates: int | None = None
    max_examples: int | None = None
    every: Every | None = None

    def __post_init__(self) -> None:
        check_count("epochs", self.passes, none="another limit")
        check_count("max_updates", self.max_updates, none="another limit")
        check_count("max_examples", self.max_examples, none="another limit")
        if self.every is not None and not isinstance(self.every, Every):
            raise HessianFlowError(
                f"every must be a hf.training.Every, got {article(self.every)}: pass one, as in"
                " Every(updates=500)"
            )
        if not self._limits:
            raise HessianFlowError("a run needs an end: pass epochs, max_updates or max_examples")

    @cached_property
    def counts_passes(self) -> bool:
        """Whether the run and its epochs are counted only in passes over the data."""
        return self.every is None and list(self._limits) == ["passes"]

    @property
    def settings(self) -> dict[str, int | None]:
        """The limits of the run, and the length of its epochs, as plain values."""
        further = {"max_updates": self.max_updates, "max_examples": self.max_examples}
        if self.every is not None:
            further |= {f"every_{unit}": length for unit, length in vars(self.every).items()}
        stated = {name: value for name, value in further.items() if value is not None}
        return {"epochs": self.passes, **stated}

    @cached_property
    def examples_per_epoch(self) -> int:
        """Examples of an epoch; UNKNOWN if updates or the end of the data end it."""
        if self.every is None:
            return self.num_examples
        return self.every.examples or UNKNOWN

    def total(self, unit: Unit) -> int | None:
        """Return the length of the whole run in a unit; None if it depends on batch sizes."""
        totals = [self._converted(limit, of, unit) for of, limit in self._limits.items()]
        if None in totals:
            return None
        return min(total for total in totals if total is not None)

    @cached_property
    def _total_epochs(self) -> int | None:
        return self.total("epochs")

    @cached_property
    def _limits(self) -> dict[_Limit, int]:
        """The limits that are stated."""
        limits: dict[_Limit, int | None] = {
            "passes": self.passes,
            "updates": self.max_updates,
            "examples": self.max_examples,
        }
        return {unit: limit for unit, limit in limits.items() if limit is not None}

    def _converted(self, limit: int, of: _Limit, to: Unit) -> int | None:
        """Convert a limit from one unit to another; return None if that is impossible."""
        if of == "passes" and to == "epochs" and self.every is None:
            return limit
        if of == "passes":
            if self.num_examples == UNKNOWN:
                return None
            return self._converted(limit * self.num_examples, "examples", to)
        if of == to:
            return limit
        length = known(self.examples_per_epoch)
        if of == "updates":
            length = self._updates_per_epoch
        if to != "epochs" or length is None:
            return None
        return math.ceil(limit / length)

    @property
    def _updates_per_epoch(self) -> int | None:
        """Updates of an epoch; None if their number depends on batch sizes."""
        if self.every is None:
            return None
        return self.every.updates

    def steps(self, batch_size: int) -> int:
        """Return the number of updates of the whole run at a constant batch size."""
        limits = [self.max_updates]
        if self.max_examples is not None:
            limits.append(-(-self.max_examples // batch_size))
        if self.passes is not None:
            limits.append(self.passes * -(-self.num_examples // batch_size))
        return min(limit for limit in limits if limit is not None)

    def after(self, position: Position, examples: int, *, data_ended: bool = False) -> Position:
        """Return the position after one more update; `data_ended` says that it ended a pass."""
        now = Position(
            position.epoch,
            position.examples + examples,
            position.updates + 1,
            position.place + examples,
            position.steps + 1,
            position.passes,
            position.read + examples,
        )
        if data_ended or now.read >= self.num_examples:
            now = now.next_pass()
        # If the run ends within an epoch, that epoch is shorter and counts as well.
        if self._ends_epoch(now, examples) or self.is_over(now):
            now = now.next_epoch()
        return now

    def after_pass(self, position: Position) -> Position:
        """Return the position after a pass that turned out to have ended with the last update."""
        now = position.next_pass()
        if self.every is None or (self.is_over(now) and now.place > 0):
            now = now.next_epoch()
        return now

    def _ends_epoch(self, now: Position, examples: int) -> bool:
        """Return whether the update on `examples` that led to `now` was the last of its epoch."""
        if self.every is None:
            return now.read == 0
        if self.every.updates is not None:
            return now.steps >= self.every.updates
        # Epochs end at multiples, so that batches that reach beyond one do not add up to a drift.
        length = self.examples_per_epoch
        return now.examples // length > (now.examples - examples) // length

    def is_over(self, position: Position) -> bool:
        """Return whether the run has reached one of its limits."""
        if self.passes is not None and position.passes >= self.passes:
            return True
        if self.max_updates is not None and position.updates >= self.max_updates:
            return True
        return self.max_examples is not None and position.examples >= self.max_examples

    def progress(self, position: Position) -> Progress:
        """Return the position in the form that controllers receive."""
        passed: float | None = None
        if self.examples_per_epoch == UNKNOWN:
            passed = float(position.epoch)
            if self._updates_per_epoch is not None:
                passed += position.steps / self._updates_per_epoch
        done: float | None = None
        if not self.counts_passes:
            done = self._fraction(position)
        return Progress(
            position.epoch,
            position.examples,
            position.updates,
            self.examples_per_epoch,
            self._total_epochs,
            passed,
            done,
        )

    def _fraction(self, position: Position) -> float:
        """Return the share of the run that is over, by the limit that is nearest to its end."""
        reached: dict[_Limit, float] = {
            "passes": position.passes + position.read / self.num_examples,
            "updates": position.updates,
            "examples": position.examples,
        }
        return min(1.0, max(reached[unit] / limit for unit, limit in self._limits.items()))
