"""How the learning rate follows the batch size.

- "linear": rate * k for a batch k times larger (Goyal et al., arXiv:1706.02677, section 2.1).
- "sqrt": rate * sqrt(k) (Krizhevsky, arXiv:1404.5997; usual with adaptive optimizers).
- "none": the rate stays.
"""

import math
from typing import Literal, get_args

from hessianflow.control.checks import check_count, check_number
from hessianflow.interfaces.errors import HessianFlowError

LRRule = Literal["linear", "sqrt", "none"]


def lr_factor(
    batch_size: int,
    reference_batch_size: int,
    rule: LRRule = "linear",
    *,
    max_factor: float | None = None,
) -> float:
    """Factor of the learning rate stated at `reference_batch_size`, at most `max_factor` when
    given.

    Raises:
        HessianFlowError: a size is below 1, the rule unknown, or the cap not positive.
    """
    check_count("batch_size", batch_size)
    check_count("reference_batch_size", reference_batch_size)
    check_rule(rule)
    scale = batch_size / reference_batch_size
    factor = {"linear": scale, "sqrt": math.sqrt(scale), "none": 1.0}[rule]
    return (
        factor
        if max_factor is None
        else min(factor, check_number("max_factor", max_factor, above=0))
    )


def check_rule(rule: str) -> None:
    """Refuse an unknown rule.

    Raises:
        HessianFlowError: it is not one of the three.
    """
    if rule not in get_args(LRRule):
        raise HessianFlowError(
            f"lr_rule must be one of {', '.join(get_args(LRRule))}, got {rule!r}"
        )


def momentum_correction(momentum: float, old_rate: float, new_rate: float) -> float:
    """The momentum of the one step that follows a change of rate: momentum * new_rate / old_rate.

    For optimizers that keep the rate inside the buffer, v = m v + rate * g (LARS in its paper
    form): the correction restores v = rate * (sum of m^i g), as if the new rate had always been in
    force (Goyal et al., remark 3). Optimizers that apply the rate outside, as `torch.optim.SGD`
    does, need none.

    Raises:
        HessianFlowError: momentum outside [0, 1), or a rate that is not positive.
    """
    check_number("momentum", momentum, low=0)
    if momentum >= 1:
        raise HessianFlowError(f"momentum must be < 1, got {momentum!r}")
    check_number("old_rate", old_rate, above=0)
    check_number("new_rate", new_rate, above=0)
    return momentum * new_rate / old_rate
