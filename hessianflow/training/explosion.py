"""The rule by which a finite loss has exploded: it stays far above the mean of the run.

A single large loss says little: where large targets (claims, prices) are rare, one batch may hold
many of them. A loss that diverges stays large. The rule therefore never judges a single loss, only
streaks of losses above `ratio` times the mean of all losses before them. By Markov's inequality at
most one loss in `ratio` lies that high, whatever the distribution, and a streak of three happens by
chance about once in `ratio`^3 updates. While few losses are known, the streak must be longer: the m
largest of n + m losses that are alike in distribution come last once in C(n + m, m) runs, and the
rule requires that this be rarer than once in ten thousand. One loss below the limit does not end a
streak, because a classifier that has diverged still gets a batch right at times. This rule is our
choice.

Where the streak must be long, the weights show a divergence sooner: after a streak of three during
which the weights grew by more than `ratio`, the run has diverged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHORTEST = 3
"""Length in updates of a streak that decides once many losses are known."""
LONGEST = 50
"""Length in updates of a streak that always decides."""
RUNS = 10_000
"""The rule stops at most one healthy run in this many by chance."""
FLOOR = 1.0
"""Smallest mean to compare with: a loss near 0 may rise a hundredfold and still be small."""


class ExplosionRule:
    """Judges the losses of a run, in the order of its updates.

    Args:
        ratio: a loss above this many times the mean so far is far above it; None: none is.
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
        """Mean of the losses so far, without those of the present streak."""
        return self._mean

    @property
    def in_doubt(self) -> bool:
        """Whether a streak has begun that is still too short to decide."""
        return bool(self._streak)

    def first_bad(self, losses: Sequence[float]) -> int | None:
        """Return the index in `losses`, the next ones, at which the run diverged; None: it did not.

        A negative index counts back into the losses seen before.
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
        """Return how many losses ago the run diverged, if weights that grew this much show it."""
        if self._ratio is None or growth <= self._ratio or self._above < SHORTEST:
            return None
        return len(self._streak)

    def start_epoch(self) -> None:
        """Remember the mean so far, with which the mean of the epoch is compared."""
        self._known = self._count, self._mean

    def epoch_exploded(self, mean: float) -> bool:
        """Return whether the mean loss of an epoch lies far above that of all epochs before.

        On the same data it should not. The comparison shows an explosion even where an epoch has
        only a step or two.
        """
        count, known = self._known
        return self.in_doubt and self._is_far_above(mean, known, count)

    def forget_streak(self) -> None:
        """Drop the present streak."""
        self._streak: list[float] = []
        self._above = 0
        self._was_below = False

    def state_dict(self) -> dict[str, Any]:
        """Return the mean so far and the present streak."""
        return {
            "count": self._count,
            "mean": self._mean,
            "known": list(self._known),
            "streak": list(self._streak),
            "above": self._above,
            "was_below": self._was_below,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the mean and the streak of :meth:`state_dict`."""
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
    """Return the length of a streak that decides, when `count` losses were seen before it."""
    length = SHORTEST
    while length < LONGEST and math.comb(count + length, length) < RUNS:
        length += 1
    return length
