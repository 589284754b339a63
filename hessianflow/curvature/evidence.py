"""The conditions under which Ritz pairs are accepted, and the order in which they are wanted.

lanczos.py gives the reasons. The constants here are our choices, from the measurements they cite.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hessianflow.curvature.results import Which

Array = npt.NDArray[np.float64]


class Evidence(NamedTuple):
    """Bounds on residuals, below which a gap between Ritz values is trusted.

    `angle` and `forecast` are for a single pair. The former bounds the sine of the angle to the
    eigenvector, the latter what one more product would leave if the residual fell as it did last.
    """

    cap: float  # the largest residual, relative to the value
    angle: float  # the same, relative to the gap to the next Ritz value
    forecast: float  # relative to the value and to the root of the tolerance


COLD = Evidence(0.01, 0.04, 0.014)
"""The bounds for random starts. The forecast is what keeps a search from settling on another value
where the leading ones are close: with leading values 3.5 % apart, 2 of 150 searches did so with it,
13 without it under a stricter angle. On networks with a gap it adds a twelfth to the products at a
tolerance of 1e-3 and next to nothing at 1e-2 (experiments/benchmarks/curvature.md)."""

WARM = Evidence(0.015, 0.04, math.inf)
"""The bounds for starts from the probe's sum of remembered vectors. Most products of a warm call go
into this evidence: the value is often within a tenth of the tolerance one or two products earlier.
Laxer bounds (a cap of 0.03, an angle of 0.1) save up to 15 % of the products but miss more than
half of the values that rose above the leading one since the last call. These bounds miss a quarter;
with the forecast of COLD they would miss a seventh and cost small nets more products
(experiments/benchmarks/warm_start.py). Remembered vectors hold both of two values 1.5 to 5 % apart,
so those need no forecast."""


class Demand(NamedTuple):
    """The accuracy that one search asks of its wanted pairs.

    The bounds of `evidence` vouch for errors of values up to `tol`; residuals up to `residual_tol`,
    relative to the value, bound the error of the vectors.
    """

    tol: float
    evidence: Evidence = COLD
    residual_tol: float = math.inf

    @property
    def tie(self) -> float:
        """Return half the tolerance (errors have the rest), up to which magnitudes are equal."""
        return min(self.tol, WIDEST_TIE) / 2

    def largest_residual(self, magnitudes: Array) -> Array:
        """Return the residuals that cap and `residual_tol` allow for values of these magnitudes."""
        cap = max(self.tol, min(self.evidence.cap, math.sqrt(self.tol / 10)))
        limits: Array = min(cap, self.residual_tol) * magnitudes
        return limits

    def largest_forecast(self, magnitude: float, before: float) -> float:
        """Return the largest residual r for which r min(1, r / before) is as small as asked."""
        asked = self.evidence.forecast * math.sqrt(self.tol) * magnitude
        return max(asked, math.sqrt(asked * before))


SPREAD_SHARE = 0.1
"""Largest residual relative to the spread of the Ritz values. In nets the spread is about the
leading value, and the cap on the residual is by far the stricter of the two."""

REACH = 3.0
"""Number of residuals by which a Ritz value of the check may still grow. In 160 searches for the
top five values of small nets, 1.5 % apart, 4 missed one with a reach of 1, 1 with 2, none with
3."""

FEW_ROWS = 20
"""Up to this many rows, the search takes as many steps as there are rows: a random start may have
next to no part in the leading vector, and the other values of a small matrix are soon known. With
fewer steps about 2 to 4 % of random matrices of 4 to 15 rows converged to a wrong value, and 1 or
2 % of larger ones."""

WIDEST_TIE = 0.01
"""Two values of opposite sign tie, and the positive one comes first, if their magnitudes differ by
less than half the tolerance or half of this, whichever is less: under a lax tolerance a value that
is clearly smaller should not lead."""

ROUNDING = 50.0
"""Rounding error of a product, in machine epsilons of the largest magnitude. In float32 the leading
eigenvalues of a digits MLP are off by 1 to 3 epsilons, and by up to 37 after training to a small
loss."""

ZERO = 2.0
"""A value below this many machine epsilons of the largest magnitude counts as zero: added to that
magnitude, it would vanish."""


def wantedness(values: Array, which: Which, tie: float) -> Array:
    """Return a number for each value that is larger the more the value is wanted.

    In a tie (+3 and -3, up to `tie`) the positive value is wanted more, so that the answer does not
    depend on the seed.
    """
    if which == "LM":
        return np.abs(values) * np.where(values > 0, 1 + tie, 1.0)
    if which == "LA":
        return values
    return -values


def order(values: Array, which: Which, tie: float) -> npt.NDArray[np.intp]:
    """Return the indices of ascending `values`, from the most to the least wanted."""
    indices: npt.NDArray[np.intp] = np.argsort(-wantedness(values, which, tie), kind="stable")
    return indices


def neighbours(values: Array, wanted: int) -> list[int]:
    """Return the indices of the values next above and next below each of the first `wanted`."""
    by_value = np.argsort(values).tolist()
    rank = {index: position for position, index in enumerate(by_value)}
    beside = {rank[i] + step for i in range(wanted) for step in (-1, 1)}
    return sorted({by_value[p] for p in beside if 0 <= p < len(by_value)})


def gap_of_first(values: Array, tol: float) -> float:
    """Return the gap from the first value to the nearest that differs by more than `tol` of it."""
    distances = np.abs(values[1:] - values[0])
    others = distances[distances > tol * abs(values[0])]
    return float(others.min(initial=math.inf))


def estimated_errors(values: Array, known: list[int], residuals: Array, wanted: int) -> Array:
    """Return min(r, r^2/gap) for the first `wanted` values.

    `known` are the values that have a residual; they include the neighbours of each wanted value.
    """
    distances = np.abs(values[:wanted, None] - values[None, known]) - residuals[None, :]
    distances[np.arange(wanted), np.arange(wanted)] = np.inf
    # A single Ritz value has no neighbour and so no gap: only the linear bound is known.
    gap = distances.min(axis=1)
    gap = np.where(np.isinf(gap) | (gap < 0), 0.0, gap)
    r = residuals[:wanted]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimates: Array = np.where(gap > 0, np.minimum(r, r * r / gap), r)
    return estimates
