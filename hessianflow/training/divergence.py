"""What to do when the training loss is no longer finite, or explodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from hessianflow.interfaces import AgreedError, Decision, World
from hessianflow.training import checkpoint
from hessianflow.training.totals import RunningTotals

OnDivergence = Literal["stop", "rollback"]


class DivergenceError(AgreedError):
    """The training loss stopped being finite, or exploded."""


class DivergenceWatch:
    """Looks for a loss that diverged, a weight that is not finite, and a buffer that no longer is, on any rank.

    Args:
        weights: what is trained.
        model: a buffer of its may hold infinities of its own (an attention mask): those finite now are watched.
        totals: know the losses.
        world: the ranks that look together.
    """

    def __init__(self, weights: Sequence[nn.Parameter], model: nn.Module, totals: RunningTotals, world: World) -> None:
        buffers = [buffer for buffer in model.buffers() if checkpoint.all_finite([buffer])]
        self._tensors: list[Tensor] = [*weights, *buffers]
        self._totals, self._world = totals, world

    def first_bad_update(self, updates: int) -> int | None:
        """The first update that diverged, at the latest the last of `updates`; None: none did."""
        found = self._totals.first_bad_update()
        if found is None and not checkpoint.all_finite(self._tensors):
            found = updates
        return min((update for update in self._world.gather(found) if update is not None), default=None)


@dataclass(frozen=True)
class DivergencePolicy:
    """Stop, or go back to the last checkpoint, undo the last growth and hold the batch below it.

    Attributes:
        mode: "stop" or "rollback".
        max_rollbacks: how often to go back before stopping all the same.
    """

    mode: OnDivergence = "stop"
    max_rollbacks: int = 3

    def cap(self, growths: Sequence[dict[str, Any]], rollbacks: int, cap: int | None) -> int | None:
        """The largest batch to allow from now on; None: stop.

        Args:
            growths: rows of the growths so far.
            rollbacks: how often the run went back before.
            cap: the largest batch allowed so far, if limited.
        """
        if self.mode == "stop" or not growths or rollbacks >= self.max_rollbacks:
            return None
        before = int(growths[-1]["from"])
        return before if cap is None else min(before, max(1, cap // 2))


def rate_rule(decisions: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(p, factor): the learning rate went with batch^p in the last growth, p in [0, 1]; its factor until then.

    Args:
        decisions: rows of all changes so far, the last growth among them.
    """
    last = max(index for index, row in enumerate(decisions) if row["to"] > row["from"])
    row, before = decisions[last], decisions[last - 1]["lr_factor"] if last > 0 else 1.0
    if min(row["lr_factor"], before) <= 0:
        return 1.0, math.inf
    power = math.log(row["lr_factor"] / before) / math.log(row["to"] / row["from"])
    return min(1.0, max(0.0, power)), before


def hold(decision: Decision, cap: int | None, power: float = 1.0, max_factor: float = math.inf) -> Decision:
    """The decision with the batch held at `cap` examples, and the learning rate with it.

    Its factor goes with batch^power, and is never above `max_factor`: a controller whose rate does not follow one power
    of the batch may have gone far ahead with either.
    """
    if cap is None or decision.batch_size <= cap:
        return decision
    factor = min(decision.lr_factor * (cap / decision.batch_size) ** power, max_factor)
    reason = f"{decision.reason} (held at {cap} since a divergence)".strip()
    return replace(decision, batch_size=cap, lr_factor=factor, reason=reason)
