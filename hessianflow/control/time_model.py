"""A line for the seconds per step of a batch size, whose fit is robust to outliers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hessianflow.checks import check_count, check_number
from hessianflow.interfaces.errors import HessianFlowError


@dataclass(frozen=True)
class TimeModel:
    """The line t(B) = slope * B + intercept, in seconds per step of B examples.

    Attributes:
        slope: Seconds per example.
        intercept: Seconds per step of any size.
        residual: Largest |fitted - measured| / measured (0 for a line that was not fitted).
        smallest: Smallest size measured, below which the line should not be trusted.
        largest: Largest size measured; 0 for a line that was not fitted.

    Raises:
        HessianFlowError: The slope is not positive, or the intercept is negative.
    """

    slope: float
    intercept: float
    residual: float = 0.0
    smallest: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        check_number("slope", self.slope, above=0)
        check_number("intercept", self.intercept, low=0)

    def step_seconds(self, batch_size: int) -> float:
        """Return the seconds of one step of `batch_size` examples."""
        return self.slope * batch_size + self.intercept

    def seconds(self, examples: float, batch_size: float) -> float:
        """Return (slope + intercept / batch_size) * examples, the seconds of these examples.

        They are taken in steps of `batch_size`, the last of which counts by its size.
        """
        return (self.slope + self.intercept / batch_size) * examples


def fit_time_model(
    batch_sizes: Sequence[int], seconds: Sequence[float], *, clip_intercept: bool = False
) -> TimeModel:
    """Return the line through measured (batch size, seconds per step) by Theil and Sen.

    The slope is the median of the slopes between all pairs of different sizes, the intercept the
    median of seconds - slope * size, so that a quarter of outliers does no harm. Several
    measurements of one size are welcome. Leave out the first steps of a run; if seconds rise in
    jumps (tensor cores, a full memory), fit the range in use.

    Args:
        batch_sizes: Examples per step.
        seconds: Seconds per step, one for each of the sizes.
        clip_intercept: Use 0 for a negative intercept instead of refusing it. A plan of dual
            batches needs a positive one, a prediction of run times does not.

    Raises:
        HessianFlowError: Lengths differ, there are fewer than two different sizes, or a value or
            the fitted slope or intercept is not positive.
    """
    if len(batch_sizes) != len(seconds):
        raise HessianFlowError(
            f"seconds must match the {len(batch_sizes)} batch_sizes, got {len(seconds)}"
        )
    points = [
        (check_count("batch_sizes", b), check_number("seconds", t, above=0))
        for b, t in zip(batch_sizes, seconds, strict=True)
    ]
    slopes = [(t2 - t1) / (b2 - b1) for (b1, t1), (b2, t2) in combinations(points, 2) if b1 != b2]
    if not slopes:
        raise HessianFlowError(
            f"batch_sizes must hold at least two different sizes, got {list(batch_sizes)}"
        )
    slope = statistics.median(slopes)
    intercept = statistics.median(t - slope * b for b, t in points)
    if clip_intercept:
        intercept = max(intercept, 0.0)
    if slope <= 0 or (intercept <= 0 and not clip_intercept):
        raise HessianFlowError(
            f"the fitted line must rise from a positive time, got slope {slope:.4g} and intercept"
            f" {intercept:.4g}: measure more and larger sizes, after a warm-up"
        )
    residual = max(abs(slope * b + intercept - t) / t for b, t in points)
    return TimeModel(slope, intercept, residual, min(batch_sizes), max(batch_sizes))
