"""When a finite loss counts as exploded: it stays far above what it was, and does not come back.

A loss that is large once says little: of rare large targets (claims, prices) one batch may hold
many. One that diverges stays large. So single losses are never judged, but streaks of losses above
`ratio` times the mean of all before them: by Markov's inequality at most one loss in `ratio` lies
there, whatever its distribution, and a streak of three happens by chance once in some `ratio`^3
updates. As long as few losses came before, the streak must be longer: the largest m of n + m losses
that are alike in distribution come last once in C(n + m, m) runs, and that must be once in ten
thousand. A single loss below does not end a streak: classifiers that diverged still get a batch
right at times. Ours.

Where many losses must be waited for, the weights tell sooner: a streak of three with weights that
have grown `ratio` times meanwhile, too, is one of a run that diverged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHORTEST, LONGEST = 3, 50
"""Updates in a row: once many losses are known, and when one is."""
RUNS = 10_000
"""A healthy run is stopped by chance less often than once in so many."""
FLOOR = 1.0
"""A mean below this counts as this: losses near 0 may rise a hundredfold and still be small."""


class ExplosionRule:
    """Judges the losses of a run, in the order of its updates.

    Args:
        ratio: how many times the mean loss so far counts as far above it; None: no finite loss
            does.
    """

    def __init__(self, ratio: float | None) -> None:
        self._ratio = ratio
        self._count, self._mean = 0, 0.0
        self._was_below = False
        self.forget_streak()
        self._known = 0, 0.0

    @property
    def mean(self) -> float:
        """Of the losses so far, those under suspicion apart."""
        return self._mean

    @property
    def in_doubt(self) -> bool:
        """Whether the latest losses lie far above those before, for too short a time to say."""
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
        """Remember the mean so far, to hold that of the epoch against it."""
        self._known = self._count, self._mean

    def epoch_exploded(self, mean: float) -> bool:
        """Return whether the mean loss of an epoch lies far above the mean loss of all epochs before.

        On the same data it should not. This shows an explosion even where an epoch has only a step
        or two.

        So that it is seen also where an epoch has no more than a step or two.
        """
        count, known = self._known
        return self.in_doubt and self._is_far_above(mean, known, count)

    def forget_streak(self) -> None:
        """Begin to watch afresh."""
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
        self._count, self._mean = int(state["count"]), float(state["mean"])
        count, mean = state["known"]
        self._known = int(count), float(mean)
        self._streak, self._above, self._was_below = list(state["streak"]), state["above"], state["was_below"]

    def _is_far_above(self, loss: float, mean: float, count: int) -> bool:
        return self._ratio is not None and count > 0 and abs(loss) > self._ratio * max(mean, FLOOR)

    def _take(self, losses: Sequence[float]) -> None:
        for loss in losses:
            self._count += 1
            self._mean += (loss - self._mean) / self._count


def streak_needed(count: int) -> int:
    """Return how many losses in a row, far above the mean of `count` others, no healthy run shows."""
    length = SHORTEST
    while length < LONGEST and math.comb(count + length, length) < RUNS:
        length += 1
    return length
