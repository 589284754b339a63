"""What Ritz pairs must show before they are accepted, and in what order they are wanted.

The reasons are in lanczos.py.
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
        cap: the largest residual, relative to the value.
        angle: for a single pair, the largest residual relative to the gap to the next Ritz value; a
            bound on the sine of the angle to the eigenvector.
        forecast: for a single pair, the largest residual that one more product would leave if the
            residual fell as it did last, relative to the value and to the root of the tolerance.
    """

    cap: float
    angle: float
    forecast: float


COLD = Evidence(0.01, 0.04, 0.014)
"""For random starts. Of 150 of them, on leading values 3.5 % apart over a bulk below a half, 13
settled on another value under a stricter angle of 0.015 without the forecast, and 2 with the
forecast, with or without the angle. On networks with a gap the forecast adds a twelfth to the
products at a tolerance of 1e-3 and next to nothing at 1e-2: experiments/benchmarks/curvature.md."""

WARM = Evidence(0.015, 0.04, math.inf)
"""For starts from the probe's sum of remembered vectors. Most products of a warm call go into this
evidence: the value is often within a tenth of the tolerance one or two products earlier. Ours.
Laxer bounds (a cap of 0.03, an angle of 0.1) save up to 15 % of the products but miss more than
half of the values that rose above the leading one since the last call. These bounds miss a quarter;
with the forecast of COLD they would miss a seventh, at the price of more products on small nets:
experiments/benchmarks/warm_start.py. Of two values 1.5 to 5 % apart the remembered vectors hold
both, and no forecast is needed."""


class Demand(NamedTuple):
    """What one search asks of its wanted pairs.

    Attributes:
        tol: the largest relative error of a value.
        evidence: what the residuals must show for that.
        residual_tol: the largest residual relative to the value, which bounds the error of the
            vectors; infinite for no such bound.
    """

    tol: float
    evidence: Evidence = COLD
    residual_tol: float = math.inf

    @property
    def tie(self) -> float:
        """Relative difference up to which magnitudes count as equal; the other half of the
        tolerance is left for errors."""
        return min(self.tol, WIDEST_TIE) / 2

    def largest_residual(self, magnitudes: Array) -> Array:
        """Return the residuals that the cap and the residual rule allow for values of these
        magnitudes."""
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
"""How many residuals a Ritz value of the check may still grow by. Ours: of 160 runs for the top
five values of small nets, 1.5 % apart, 4 missed one with a reach of 1, 1 with 2, and none with
3."""

FEW_ROWS = 20
"""Up to this many rows, the search takes as many steps as there are rows. Ours: a random start may
have next to no part in the leading vector, and the other values of a small matrix are soon known.
With fewer steps, of 300 random matrices of each size, 11 of 4 rows, 7 of 8 and 6 of 15 converged to
a wrong value; of larger ones, one or two in 100."""

WIDEST_TIE = 0.01
"""Two values of opposite sign tie, and the positive one comes first, if their magnitudes differ by
less than half the tolerance or half of this, whichever is less. Ours: under a lax tolerance a value
that is clearly smaller should not lead."""

ROUNDING = 50.0
"""Rounding error of a product, in machine epsilons of the largest magnitude. Ours, measured: in
float32 the leading eigenvalues of a digits MLP are off by 1 to 3 epsilons, and by up to 37 after
training to a small loss."""

ZERO = 2.0
"""A value below this many machine epsilons of the largest magnitude counts as zero: added to that
magnitude, it would vanish."""


def wantedness(values: Array, which: Which, tie: float) -> Array:
    """Return how much each value is wanted; in a tie (+3 and -3, up to `tie`) the positive one
    more.

    The answer therefore does not depend on the seed.
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

    `known` are the values that have a residual; they include the neighbours of each wanted value.
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
