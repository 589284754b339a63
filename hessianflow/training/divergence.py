"""Detection of a training loss that is no longer finite or explodes, and the response to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hessianflow.checks import check_choice, check_count, check_limit
from hessianflow.interfaces import AgreedError, Decision, World
from hessianflow.training.totals import RunningTotals

OnDivergence = Literal["stop", "rollback"]


class DivergenceError(AgreedError):
    """The training loss stopped being finite, or exploded."""


class DivergenceMonitor:
    """Looks on all ranks for diverged losses, and for weights and buffers that are not finite.

    Args:
        weights: returns the parameters that are trained.
        model: the model, whose buffers are checked if they are finite now; others, such as an
            attention mask, may hold infinities on purpose.
        totals: the running totals, which hold the losses.
        world: the ranks that look together.
    """

    def __init__(
        self,
        weights: Callable[[], Sequence[nn.Parameter]],
        model: nn.Module,
        totals: RunningTotals,
        world: World,
    ) -> None:
        self._buffers: list[Tensor] = [
            buffer for buffer in model.buffers() if math.isfinite(largest([buffer]))
        ]
        self._weights = weights
        self._totals = totals
        self._world = world
        self._largest = largest(weights())

    def first_bad_update(self, updates: int, *, at_end: bool) -> int | None:
        """Return the first update that diverged, on any rank; None: none did.

        Args:
            updates: the number of updates so far.
            at_end: whether an epoch has just ended.
        """
        first_bad = self._totals.first_bad_update(at_end=at_end)
        weight = largest(self._weights())
        before = self._largest
        if first_bad is None and not math.isfinite(weight + largest(self._buffers)):
            first_bad = updates
        if first_bad is None:
            first_bad = self._totals.weights_grew(weight / max(before, 1.0))
            self._largest = weight
        every = self._world.gather(first_bad)
        return min((update for update in every if update is not None), default=None)


@dataclass(frozen=True)
class Divergence:
    """Settings that define a divergence and the response to it.

    Attributes:
        mode: the response to a loss that is no longer finite or explodes: "stop", or "rollback":
            go back to the last checkpoint, undo the last growth and keep the batch below it.
        max_rollbacks: the number of rollbacks after which a further divergence stops the run.
        max_loss_ratio: a loss explodes if it stays above this many times the mean of the run so
            far, for longer than rare large losses do (:mod:`~hessianflow.training.explosion`);
            None: a finite loss never explodes.

    Raises:
        HessianFlowError: a setting is not what it must be.
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

        Args:
            growths: rows of the growths so far.
            rollbacks: the number of rollbacks so far.
            cap: the largest batch allowed so far; None: no limit.
        """
        if self.mode == "stop" or not growths or rollbacks >= self.max_rollbacks:
            return None
        before = int(growths[-1]["from"])
        if cap is None:
            return before
        return min(before, max(1, cap // 2))


def rate_rule(decisions: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return (p, factor): the last growth scaled the rate by batch^p, p in [0, 1], from `factor`.

    Args:
        decisions: rows of all changes so far, the last growth among them.
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
