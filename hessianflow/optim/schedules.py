"""Learning-rate schedules used with large batches: factors for `torch.optim.lr_scheduler.LambdaLR`,
and recipes.

- :func:`polynomial_decay`: linear warm-up, then polynomial decay (power 2 in the LARS and CLARS
  recipes).
- :func:`linear_warmup`: warm-up alone.
- :func:`cooldown`: constant, then linearly to 0 (Hägele et al., "Scaling laws and compute-optimal
  training beyond fixed training durations", arXiv:2405.18392).
- :func:`legw`: You et al., "Large-batch training for LSTM and beyond", arXiv:1901.08256.
- :func:`lars_recipe`: base rate and warm-up by batch size of the published ResNet-50 LARS
  schedules.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.checks import check_number


class RateAndWarmup(NamedTuple):
    """A learning rate and how long to warm up to it."""

    lr: float
    warmup_epochs: float


def linear_warmup(warmup_steps: float) -> Callable[[int], float]:
    """step -> min(step / warmup_steps, 1): rate 0 in the first step, full from `warmup_steps` on.

    Raises:
        HessianFlowError: `warmup_steps` is negative or not finite.
    """
    check_number("warmup_steps", warmup_steps)
    return lambda step: min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def polynomial_decay(
    total_steps: int, warmup_steps: int = 0, *, power: float = 2.0, end_factor: float = 0.0
) -> Callable[[int], float]:
    """Linear warm-up over W steps, then (1 - end_factor) * (1 - s / S)^power + end_factor with T =
    total_steps, s = max(step - W, 1) and S = T - W + 1, as in the official CLARS code; constant at
    the end value after T steps.

    Args:
        total_steps: T, warm-up included.
        warmup_steps: W.
        power: 2 in the LARS paper.
        end_factor: last rate over peak rate (the recipes use 1e-4 / peak).

    Raises:
        HessianFlowError: a length, power or factor is out of its bounds.
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
    """step -> 1 up to step D = decay_from, then (T - step) / (T - D) down to 0 at T = total_steps,
    and 0 after it.

    Raises:
        HessianFlowError: a length is out of its bounds, or `decay_from` not below `total_steps`.
    """
    check_number("total_steps", total_steps, low=1)
    check_number("decay_from", decay_from)
    if decay_from >= total_steps:
        raise HessianFlowError(f"decay_from must be < total_steps {total_steps}, got {decay_from}")
    return lambda step: min(1.0, max(0.0, (total_steps - step) / (total_steps - decay_from)))


def legw(
    batch_size: int, base_batch_size: int, base_lr: float, base_warmup_epochs: float
) -> RateAndWarmup:
    """Linear-epoch gradual warm-up: with k = batch_size / base_batch_size, rate * sqrt(k), warm-up
    epochs * k.

    Raises:
        HessianFlowError: a size is below 1, or a rate or length negative.
    """
    check_number("batch_size", batch_size, low=1)
    check_number("base_batch_size", base_batch_size, low=1)
    check_number("base_lr", base_lr)
    check_number("base_warmup_epochs", base_warmup_epochs)
    scale = batch_size / base_batch_size
    return RateAndWarmup(base_lr * math.sqrt(scale), base_warmup_epochs * scale)


def lars_recipe(batch_size: int, variant: Literal["short", "long"] = "short") -> RateAndWarmup:
    """Base rate and warm-up epochs of LARS for ResNet-50 on ImageNet in 90 epochs, decay of power
    2.

    Below 8192: 5.0 and 5 epochs; below 16384: 10.0 and 5; below 32768: 25.0 and 5; from there on
    two variants were published: 32.0 with 14 epochs ("short") and 31.2 with 25 ("long").

    Raises:
        HessianFlowError: the size is below 1, or the variant unknown.
    """
    check_number("batch_size", batch_size, low=1)
    if variant not in ("short", "long"):
        raise HessianFlowError(f"variant must be short or long, got {variant!r}")
    for limit, lr in ((8192, 5.0), (16384, 10.0), (32768, 25.0)):
        if batch_size < limit:
            return RateAndWarmup(lr, 5)
    return RateAndWarmup(32.0, 14) if variant == "short" else RateAndWarmup(31.2, 25)
