"""When a finite loss counts as exploded: it stays far above what it was, and does not come back.

A single large loss says little: where large targets (claims, prices) are rare, one batch may hold
many of them. A loss that diverges stays large. The rule therefore never judges a single loss, only
streaks of losses above `ratio` times the mean of all losses before them. By Markov's inequality at
most one loss in `ratio` lies that high, whatever the distribution, and a streak of three happens by
chance about once in `ratio`^3 updates. While few losses are known, the streak must be longer: the m
largest of n + m losses that are alike in distribution come last once in C(n + m, m) runs, and the
rule requires that this be rarer than once in ten thousand. One loss below the limit does not end a
streak: a classifier that has diverged still gets a batch right at times. The rule is ours.

Where the streak must be long, the weights tell sooner: after a streak of three during which the
weights grew by more than `ratio`, the run has diverged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHORTEST, LONGEST = 3, 50
"""Length of a streak in updates: the shortest, once many losses are known, and the longest."""
RUNS = 10_000
"""Chance stops at most one healthy run in this many."""
FLOOR = 1.0
"""A smaller mean is replaced by this: a loss near 0 may rise a hundredfold and still be small."""


class ExplosionRule:
    """Judges the losses of a run, in the order of its updates.

    Args:
        ratio: a loss above this many times the mean so far is far above it; None: no finite loss
            ever is.
    """

    def __init__(self, ratio: float | None) -> None:
        self._ratio = ratio
        self._count = 0
        self._mean = 0.0
        self._was_below = False
        self.forget_streak()
        self._known = 0, 0.0

    @property
    def mean(self) -> float:
        """The mean of the losses so far, without those of the present streak."""
        return self._mean

    @property
    def in_doubt(self) -> bool:
        """Whether a streak has begun that is still too short to decide."""
        return bool(self._streak)

    def first_bad(self, losses: Sequence[float]) -> int | None:
        """Return which of the next losses is where the run diverged; None: none is.

        A negative number counts back into the losses seen before.
        """
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                return number
            is_above = self._is_far_above(loss, self._mean, self._count)
            self._streak.append(abs(loss))
            if is_above:
                self._above += 1
                if self._above >= streak_needed(self._count):
                    return number + 1 - len(self._streak)
            elif self._above == 0 or self._was_below:
                self._take(self._streak)
                self.forget_streak()
            self._was_below = not is_above
        return None

    def weights_tell(self, growth: float) -> int | None:
        """Return how many losses back the run diverged, if weights that grew by this factor show
        it; None otherwise."""
        has_grown = self._ratio is not None and growth > self._ratio
        return len(self._streak) if has_grown and self._above >= SHORTEST else None

    def start_epoch(self) -> None:
        """Remember the mean so far, to compare the mean of the epoch with it."""
        self._known = self._count, self._mean

    def epoch_exploded(self, mean: float) -> bool:
        """Return whether the mean loss of an epoch lies far above the mean loss of all epochs
        before.

        On the same data it should not. This shows an explosion even where an epoch has only a step
        or two.
        """
        count, known = self._known
        return self.in_doubt and self._is_far_above(mean, known, count)

    def forget_streak(self) -> None:
        """Drop the present streak."""
        self._streak: list[float] = []
        self._above = 0
        self._was_below = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return {
            "count": self._count,
            "mean": self._mean,
            "known": list(self._known),
            "streak": list(self._streak),
            "above": self._above,
            "was_below": self._was_below,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._count = int(state["count"])
        self._mean = float(state["mean"])
        count, mean = state["known"]
        self._known = int(count), float(mean)
        self._streak = list(state["streak"])
        self._above = state["above"]
        self._was_below = state["was_below"]

    def _is_far_above(self, loss: float, mean: float, count: int) -> bool:
        return self._ratio is not None and count > 0 and abs(loss) > self._ratio * max(mean, FLOOR)

    def _take(self, losses: Sequence[float]) -> None:
        for loss in losses:
            self._count += 1
            self._mean += (loss - self._mean) / self._count


def streak_needed(count: int) -> int:
    """Return how many losses in a row, far above the mean of `count` others, no healthy run
    shows."""
    length = SHORTEST
    while length < LONGEST and math.comb(count + length, length) < RUNS:
        length += 1
    return length
