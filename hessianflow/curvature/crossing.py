"""The first root of a function of one number that costs a forward pass, in a handful of calls.

Regula falsi in the Illinois form: a straight line is solved by its second call.
"""

import math
from collections.abc import Callable

WIDEST = 10.0
"""Largest factor between two trials: a curvature taken from a short step is mostly rounding."""
FURTHEST = 100.0
"""Largest factor where it is not. Our choice: no loss is a parabola for very long."""
SURE = 10.0
"""Least rise of the function, in its errors, that shows more than rounding. Our choice."""
NARROWEST = 1.5
"""Smallest factor between two trials while no trial is beyond the root. Our choice."""
NEAR = 0.01
"""A trial is the root if the function is below this share of its value at 0. Our choice."""


def crossing(
    function: Callable[[float], float],
    at_zero: float,
    most: int,
    *,
    first: float = 1.0,
    error: float = 0.0,
) -> float:
    """Return where a function that is negative at 0 turns positive, or inf.

    Args:
        function: of a positive number; on a quadratic loss it is a straight line.
        at_zero: its value at 0, which is negative.
        most: most calls.
        first: the first trial.
        error: error of the function times its argument.
    """
    low = 0.0
    below = at_zero  # the function at low, halved each time that the other end moves alone
    high = math.inf
    above = math.inf
    trial = first
    for _ in range(most):
        value = function(trial)
        if abs(value) <= NEAR * -at_zero:
            return trial
        if value < 0:
            if high < math.inf:
                above /= 2
            low = trial
            below = value
        else:
            if high < math.inf:
                below /= 2
            high = trial
            above = value
        trial = _next(low, below, high, above, at_zero, error)
    if high == math.inf:
        return math.inf
    return trial


def _next(
    low: float, below: float, high: float, above: float, at_zero: float, error: float
) -> float:
    """Return the next trial within the bracket, or beyond its open end."""
    if high == math.inf:
        # The line through the values at 0 and at low.
        rise = below - at_zero
        reach = WIDEST
        if rise > 0:
            widest = WIDEST
            if rise * low > SURE * error:
                widest = FURTHEST
            reach = min(max(-at_zero / rise, NARROWEST), widest)
        return low * reach
    if above == math.inf:
        if low == 0:
            return high / WIDEST
        return math.sqrt(low * high)
    return _root(low, below, high, above)


def _root(low: float, below: float, high: float, above: float) -> float:
    return low + (high - low) * below / (below - above)
