"""Learning-rate schedules for large batches: factors for `torch.optim.lr_scheduler.LambdaLR`.

- :func:`polynomial_decay`: linear warm-up, then polynomial decay (power 2 in the LARS and CLARS
  recipes).
- :func:`cooldown`: constant, then linearly to 0 (Hägele et al., "Scaling laws and compute-optimal
  training beyond fixed training durations", arXiv:2405.18392).
"""

from collections.abc import Callable

from hessianflow.checks import check_number
from hessianflow.interfaces import HessianFlowError


def polynomial_decay(
    total_steps: int, warmup_steps: int = 0, *, power: float = 2.0, end_factor: float = 0.0
) -> Callable[[int], float]:
    """Return the factor of linear warm-up and polynomial decay, as in the official CLARS code.

    After W warm-up steps the factor is (1 - end_factor) * (1 - s / S)^power + end_factor with
    s = max(step - W, 1) and S = T - W + 1; after T steps it stays at the end value.

    Args:
        total_steps: Number T of steps, warm-up included.
        warmup_steps: Number W of warm-up steps.
        power: Exponent (2 in the LARS paper).
        end_factor: Last rate over peak rate (the recipes use 1e-4 / peak).

    Raises:
        HessianFlowError: A length, power or factor is out of its bounds.
    """
    check_number("total_steps", total_steps, low=1)
    check_number("warmup_steps", warmup_steps)
    check_number("power", power)
    check_number("end_factor", end_factor)
    if warmup_steps >= total_steps:
        raise HessianFlowError(
            f"warmup_steps must be < total_steps {total_steps}, got {warmup_steps}"
        )
    length = total_steps - warmup_steps + 1

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        done = min(max(step - warmup_steps, 1), length)
        return float((1 - end_factor) * (1 - done / length) ** power + end_factor)

    return factor


def cooldown(total_steps: float, decay_from: float) -> Callable[[float], float]:
    """Return the factor that is 1 up to step D = decay_from, then falls linearly to 0.

    It is (T - step) / (T - D) up to T = total_steps, and 0 after it.

    Raises:
        HessianFlowError: A length is out of its bounds, or `decay_from` is not below `total_steps`.
    """
    check_number("total_steps", total_steps, low=1)
    check_number("decay_from", decay_from)
    if decay_from >= total_steps:
        raise HessianFlowError(f"decay_from must be < total_steps {total_steps}, got {decay_from}")
    return lambda step: min(1.0, max(0.0, (total_steps - step) / (total_steps - decay_from)))
