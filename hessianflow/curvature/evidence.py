"""What is asked of Ritz pairs before they are believed, and in what order they are wanted.

lanczos.py has the reasons.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hessianflow.curvature.results import Which

Array = npt.NDArray[np.float64]


class Evidence(NamedTuple):
    """How small a residual must be before a gap between Ritz values is trusted. Ours, measured.

    Attributes:
        cap: largest residual relative to its value.
        angle: for one pair, largest residual relative to the gap to the next Ritz value: a bound on
            the sine of the angle to the eigenvector.
        forecast: for one pair, largest residual that one more product would leave if it fell as
            with the last one, relative to the value and to the root of the tolerance.
    """

    cap: float
    angle: float
    forecast: float


COLD = Evidence(0.01, 0.04, 0.014)
"""Of 150 random starts on leading values 3.5 % apart over a bulk below a half, 13 settled on
another value by a stricter angle of 0.015 without the forecast, 2 with it, and as many without any
angle. On networks with a gap it adds a twelfth to the products at a tolerance of 1e-3, next to
nothing at 1e-2: experiments/benchmarks/curvature.md."""

WARM = Evidence(0.015, 0.04, math.inf)
"""From the sum of remembered vectors that the probe makes. That is where the products of a warm
call go: the value is often within a tenth of the tolerance one or two products before. Ours; laxer
ones (a cap of 0.03, an angle of 0.1) save up to 15 % of them and miss more than half of the values
that rose over the leading one since the last call, this one a quarter, one with the forecast of
COLD a seventh, for more products on small nets: experiments/benchmarks/warm_start.py. Of two values
1.5 to 5 % apart the remembered vectors hold both, and no forecast is needed."""


class Demand(NamedTuple):
    """What one search asks of its wanted pairs.

    Attributes:
        tol: largest relative error of a value.
        evidence: what is asked of the residuals for its sake.
        residual_tol: largest residual relative to the value, for the sake of the vectors; infinite:
            not asked for.
    """

    tol: float
    evidence: Evidence = COLD
    residual_tol: float = math.inf

    @property
    def tie(self) -> float:
        """Relative difference of magnitudes that count as equal; half is left for errors."""
        return min(self.tol, WIDEST_TIE) / 2

    def largest_residual(self, magnitudes: Array) -> Array:
        """Return the residuals that the cap and the residual rule allow for values of these magnitudes."""
        cap = max(self.tol, min(self.evidence.cap, math.sqrt(self.tol / 10)))
        limits: Array = min(cap, self.residual_tol) * magnitudes
        return limits

    def largest_forecast(self, magnitude: float, before: float) -> float:
        """Return the largest residual r for which r min(1, r / before) is as small as is asked."""
        asked = self.evidence.forecast * math.sqrt(self.tol) * magnitude
        return max(asked, math.sqrt(asked * before))


SPREAD_SHARE = 0.1
"""Largest residual relative to the spread of the Ritz values. Ours: in nets the spread is about the
leading value, and the cap on the residual is the stricter of the two by far."""

REACH = 3.0
"""Residuals by which a Ritz value of the check may still grow. Ours: of 160 runs for the top five
of small nets with values 1.5 % apart, 4 missed one with 1, 1 with 2, none with 3."""

FEW_ROWS = 20
"""Up to so many rows all are taken. Ours: a random start may have next to no part in the leading
vector, and of few values the others are soon known. Of 300 random matrices each, 11 of 4 rows, 7
of 8 and 6 of 15 came out wrong and converged before, one or two of 100 with more rows."""

WIDEST_TIE = 0.01
"""Of two values of either sign the positive one comes first if their magnitudes differ by less than
half the tolerance, or half of this where that is less. Ours: by a lax tolerance it should not lead
where it is clearly the smaller."""

ROUNDING = 50.0
"""Rounding errors of a product, in machine epsilons of the largest magnitude. Ours, measured: in
float32 the leading eigenvalues of a digits MLP are off by 1 to 3 of them, after training to a small
loss by up to 37."""

ZERO = 2.0
"""A value below so many machine epsilons of the largest magnitude counts as zero: it would vanish
in a sum with it."""


def wantedness(values: Array, which: Which, tie: float) -> Array:
    """Return how much each value is wanted; in a tie (+3 and -3, up to `tie`) the positive one more.

    So the answer does not hang on the seed.
    """
    if which == "LM":
        return np.abs(values) * np.where(values > 0, 1 + tie, 1.0)
    return values if which == "LA" else -values


def order(values: Array, which: Which, tie: float) -> npt.NDArray[np.intp]:
    """Return the indices of ascending `values`, from the most to the least wanted."""
    found: npt.NDArray[np.intp] = np.argsort(-wantedness(values, which, tie), kind="stable")
    return found


def neighbours(values: Array, wanted: int) -> list[int]:
    """Return the indices of the values next above and next below each of the first `wanted`."""
    by_value = np.argsort(values).tolist()
    place = {index: position for position, index in enumerate(by_value)}
    beside = {place[i] + step for i in range(wanted) for step in (-1, 1)}
    return sorted({by_value[p] for p in beside if 0 <= p < len(by_value)})


def estimated_errors(values: Array, known: list[int], residuals: Array, wanted: int) -> Array:
    """Return min(r, r^2/gap) for the first `wanted` values.

    `known` are those with a residual, the nearest ones to each wanted one among them.
    """
    distances = np.abs(values[:wanted, None] - values[None, known]) - residuals[None, :]
    distances[np.arange(wanted), np.arange(wanted)] = np.inf
    # One Ritz value alone has no neighbour to take a gap from: only the linear bound is known.
    gap = distances.min(axis=1)
    gap = np.where(np.isinf(gap) | (gap < 0), 0.0, gap)
    r = residuals[:wanted]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates: Array = np.where(gap > 0, np.minimum(r, r * r / gap), r)
    return estimates
