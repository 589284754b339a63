"""Settings and rules for a training loss that is no longer finite, or explodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hessianflow.checks import check_choice, check_count, check_limit
from hessianflow.interfaces import AgreedError, Decision

OnDivergence = Literal["stop", "rollback"]


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
            far, for longer than rare large losses do (:mod:`~hessianflow.training.explosion`);
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
