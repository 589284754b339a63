"""Settings and rules for a training loss that is no longer finite, or explodes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessianflow.checks import check_choice, check_count, check_limit
from hessianflow.interfaces import AgreedError, Decision

OnDivergence = Literal["stop", "rollback"]

SHORTEST = 3
"""Length in updates of a streak that decides once many losses are known."""
LONGEST = 50
"""Length in updates of a streak that always decides."""
RUNS = 10_000
"""The rule stops at most one healthy run in this many by chance."""
FLOOR = 1.0
"""Smallest mean to compare with: a loss near 0 may rise a hundredfold and still be small."""


class DivergenceError(AgreedError):
    """The training loss stopped being finite, or exploded."""


@dataclass(frozen=True)
class Divergence:
    """Settings that define a divergence and the response to it.

    Attributes:
        mode: the response to a loss that is no longer finite or explodes: "stop", or "rollback":
            go back to the last checkpoint, undo the last growth and keep the batch below it.
        max_rollbacks: the number of rollbacks after which a further divergence stops the run.
        max_loss_ratio: a loss explodes if it stays above this many times the mean of the run so
            far, for longer than rare large losses do (:class:`ExplosionRule`);
            None: a finite loss never explodes.
    """

    mode: OnDivergence = "stop"
    max_rollbacks: int = 3
    max_loss_ratio: float | None = 100.0

    def __post_init__(self) -> None:
        check_choice("Divergence.mode", self.mode, get_args(OnDivergence))
        check_count("Divergence.max_rollbacks", self.max_rollbacks, 0)
        none = "no limit to a finite loss"
        check_limit("Divergence.max_loss_ratio", self.max_loss_ratio, none, above=1)

    def cap(self, growths: Sequence[dict[str, Any]], rollbacks: int, cap: int | None) -> int | None:
        """Return the largest batch to allow from now on; None: stop.

        It follows from the rows of growths, the number of rollbacks and the cap so far.
        """
        if self.mode == "stop" or not growths or rollbacks >= self.max_rollbacks:
            return None
        before = int(growths[-1]["from"])
        if cap is None:
            return before
        return min(before, max(1, cap // 2))


def rate_rule(decisions: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return (p, factor): the last growth scaled the rate by batch^p, p in [0, 1], from `factor`.

    `decisions` are the rows of all changes so far.
    """
    last = max(index for index, row in enumerate(decisions) if row["to"] > row["from"])
    row = decisions[last]
    before = 1.0
    if last > 0:
        before = decisions[last - 1]["lr_factor"]
    if min(row["lr_factor"], before) <= 0:
        return 1.0, math.inf
    power = math.log(row["lr_factor"] / before) / math.log(row["to"] / row["from"])
    return min(1.0, max(0.0, power)), before


def largest(tensors: Sequence[Tensor]) -> float:
    """Return the largest magnitude among all numbers of the tensors; wait for the device once."""
    present = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    if not present:
        return 0.0
    norms = torch._foreach_norm(present, float("inf"))
    return float(torch.stack([norm.float() for norm in norms]).max())


def hold(
    decision: Decision, cap: int | None, power: float = 1.0, max_factor: float = math.inf
) -> Decision:
    """Return the decision with its batch size limited to `cap`, and the rate lowered to match.

    The rate factor is scaled by batch^power and limited to `max_factor`, because the rate of a
    controller need not follow one power of the batch.
    """
    if cap is None or decision.batch_size <= cap:
        return decision
    factor = min(decision.lr_factor * (cap / decision.batch_size) ** power, max_factor)
    reason = f"{decision.reason} (held at {cap} since a divergence)".strip()
    return replace(decision, batch_size=cap, lr_factor=factor, reason=reason)


class ExplosionRule:
    """Judges when a finite loss has exploded: it stays far above the mean of the run.

    A single large loss says little: where large targets (claims, prices) are rare, one batch may
    hold many of them. A loss that diverges stays large. The rule therefore never judges a single
    loss, only streaks of losses above `ratio` times the mean of all losses before them. By Markov's
    inequality at most one loss in `ratio` lies that high, whatever the distribution, and a streak
    of three happens by chance about once in `ratio`^3 updates. While few losses are known, the
    streak must be longer: the m largest of n + m losses that are alike in distribution come last
    once in C(n + m, m) runs, and the rule requires that this be rarer than once in ten thousand.
    One loss below the limit does not end a streak, because a classifier that has diverged still
    gets a batch right at times. This rule is our choice.

    Where the streak must be long, the weights show a divergence sooner: after a streak of three
    during which the weights grew by more than `ratio`, the run has diverged.

    Args:
        ratio: a loss above this many times the mean so far is far above it; None: none is.
    """

    def __init__(self, ratio: float | None) -> None:
        self._ratio = ratio
        self._count = 0
        self.mean = 0.0  # Of the losses so far, without those of the present streak.
        self._was_below = False
        self.forget_streak()
        self._known = 0, 0.0

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
            is_above = self._is_far_above(loss, self.mean, self._count)
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
        self._known = self._count, self.mean

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
            "mean": self.mean,
            "known": list(self._known),
            "streak": list(self._streak),
            "above": self._above,
            "was_below": self._was_below,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the mean and the streak of :meth:`state_dict`."""
        self._count = int(state["count"])
        self.mean = float(state["mean"])
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
            self.mean += (loss - self.mean) / self._count


def streak_needed(count: int) -> int:
    """Return the length of a streak that decides, when `count` losses were seen before it."""
    length = SHORTEST
    while length < LONGEST and math.comb(count + length, length) < RUNS:
        length += 1
    return length
