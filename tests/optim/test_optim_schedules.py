"""Schedules against hand-worked tables."""

import math

import pytest
import torch

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import cooldown, polynomial_decay


def test_polynomial_decay_of_a_published_run() -> None:
    """Batch 16384: 78 updates an epoch, warm-up 390, 7020 in all, peak 8.192, end 1e-4."""
    factor = polynomial_decay(7020, 390, end_factor=1e-4 / 8.192)
    rates = [8.192 * factor(step) for step in (0, 195, 390, 3705, 7019)]
    assert rates == pytest.approx([0, 4.096, 8.189529, 2.048693, 0.000101], abs=5e-7)
    assert factor(10_000) == pytest.approx(1e-4 / 8.192)


def test_polynomial_decay_drives_a_scheduler() -> None:
    """Three steps without warm-up, S = 4: factors (3/4)^2, (3/4)^2, (2/4)^2, as step 0 counts as
    1."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 16.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, polynomial_decay(3))
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [9, 9, 4]


def test_cooldown() -> None:
    """Constant for 8 of 24 steps, then a sixteenth less a step."""
    assert [cooldown(24, 8)(step) for step in (0, 8, 9, 16, 23, 24, 30)] == [
        1,
        1,
        15 / 16,
        0.5,
        1 / 16,
        0,
        0,
    ]
    assert [cooldown(2, 0)(step) for step in (0, 1, 2)] == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polynomial_decay(0), "total_steps must be a finite number >= 1, got 0"),
        (lambda: polynomial_decay(10, -1), "warmup_steps must be a finite number >= 0, got -1"),
        (lambda: polynomial_decay(10, 10), "warmup_steps must be < total_steps 10, got 10"),
        (lambda: polynomial_decay(10, power=-1), "power must be a finite number >= 0, got -1"),
        (
            lambda: polynomial_decay(10, end_factor=math.nan),
            "end_factor must be a finite number >= 0, got nan",
        ),
        (lambda: cooldown(0, 0), "total_steps must be a finite number >= 1, got 0"),
        (lambda: cooldown(8, -1), "decay_from must be a finite number >= 0, got -1"),
        (lambda: cooldown(8, 8), "decay_from must be < total_steps 8, got 8"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make()  # type: ignore[operator]
