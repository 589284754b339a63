"""Ritz pairs of an operator on a growing basis, and what their residuals say; see lanczos.py for the method.

A basis V with its products W = A V is kept, so projections, Ritz pairs and residuals cost no further product.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.rows import Rows
from hessianflow.interfaces import LinearOperator

Array = npt.NDArray[np.float64]


class Evidence(NamedTuple):
    """How small a residual must be before a gap between Ritz values is trusted. Ours, measured.

    Attributes:
        cap: largest residual relative to its value.
        angle: for one pair, largest residual relative to the gap to the next Ritz value: a bound on the sine of the
            angle to the eigenvector.
    """

    cap: float
    angle: float


COLD = Evidence(0.01, 0.015)
"""Of 150 random starts on a net's spectrum with leading values 3.5 % apart, 9 settled on the second without the rule on
the angle, 2 with it. Where the gap is wide (ResNet-20, SqueezeNext) it is free; on small nets it adds 1 to 3."""

WARM = Evidence(0.015, 0.04)
"""From the sum of remembered vectors that the probe makes. That is where the products of a warm call go: the value is
often within a tenth of the tolerance one or two products before. Ours; laxer ones (a cap of 0.03, an angle of 0.1) save
up to 15 % of them and miss more than half of the values that rose over the leading one since the last call, this
one a quarter: experiments/benchmarks/warm_start.py."""

SPREAD_SHARE = 0.1
"""Largest residual relative to the spread of the Ritz values. Ours: in nets the spread is about the leading value, and
the cap on the residual is the stricter of the two by far."""

REACH = 3.0
"""Residuals by which a Ritz value of the check may still grow. Ours: of 160 runs for the top five of small nets with
values 1.5 % apart, 4 missed one with 1, 1 with 2, none with 3."""

TIE = 1e-6
"""Magnitudes that differ by less than this share of the largest count as equal. Ours: rounding of float32 products."""


class RitzSpace:
    """The basis, its products, and the Ritz pairs of the operator on it.

    All numbers are in units of a power of two near the first product, so that squares neither vanish nor overflow.
    """

    def __init__(
        self, operator: LinearOperator, which: Which, k: int, keep: int, capacity: int, evidence: Evidence
    ) -> None:
        self._operator, self._which, self._k, self._keep = operator, which, k, keep
        self._capacity = min(operator.size, capacity)
        self._basis, self._products = (Rows(operator, self._capacity) for _ in range(2))
        self._projected = np.zeros((self._capacity, self._capacity))
        self._gram = np.zeros((self._capacity, self._capacity))
        self._evidence = evidence
        self._unit = 0.0
        self._scale = 0.0  # largest magnitude seen, also of values that a restart has dropped
        self._history: list[float] = []
        self.matvecs = 0

    @property
    def size(self) -> int:
        """Vectors in the basis."""
        return self._basis.size

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing outside."""
        return self.size == self._operator.size

    @property
    def wanted(self) -> Array:
        """The wanted values, in units of this space."""
        values: Array = self.values[: self._k].copy()
        return values

    @property
    def last_product(self) -> Tensor:
        """The product of the vector added last: where Lanczos goes next."""
        return self._products[self.size - 1]

    def extend(self, direction: Tensor) -> bool:
        """Add the part of `direction` orthogonal to the basis and its product; False if there is no such part."""
        unit = _orthogonal_part(direction, self._basis)
        if unit is None:
            return False
        if self.size == self._capacity:
            self._compress()
        product = self._scaled(self._operator.matvec(unit))
        m, self.matvecs = self.size, self.matvecs + 1
        self._basis.append(unit)
        self._products.append(product)
        # The one transfer to the host per product: 2 (m + 1) numbers, on which the stopping rule depends.
        numbers = torch.cat([self._basis.dot(product), self._products.dot(product)])
        column, gram = numbers.to("cpu", torch.float64).numpy().reshape(2, m + 1)
        if not np.isfinite(column).all():
            raise NonFiniteError(NON_FINITE_PRODUCT)
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self._gram[: m + 1, m] = self._gram[m, : m + 1] = gram
        self._solve()
        self._history.append(float(self.values[0]))
        return True

    def _solve(self) -> None:
        """Ritz values in the wanted order, the vectors' coordinates, and what can be said of residuals for free."""
        theta, coordinates = np.linalg.eigh(self._projected[: self.size, : self.size])
        self._scale = max(self._scale, float(np.abs(theta).max()))
        order = _order(theta, self._which)
        self.values, self._coordinates = theta[order], coordinates[:, order]
        # ||W s - theta V s||^2 = s^T (W^T W) s - theta^2: too rough to accept a pair by, but it costs no vectors.
        squares = ((self._gram[: self.size, : self.size] @ self._coordinates) * self._coordinates).sum(axis=0)
        self._rough = np.sqrt(np.maximum(squares - self.values**2, 0))
        self._is_measured = False

    def _measure(self) -> None:
        """Residuals and error bounds of the wanted pairs, once for each set of Ritz pairs."""
        if self._is_measured:
            return
        wanted = min(self._k, self.size)
        columns = sorted({*range(wanted), *_neighbours(self.values, wanted)})
        self._residual_vectors = self._residuals_of(columns)
        norms = self._norms_of(self._residual_vectors)
        self.residuals = norms[:wanted]
        self.bounds = _error_bounds(self.values, columns, norms, wanted)
        self._is_measured = True

    def is_accurate(self, tol: float) -> bool:
        """Whether all k wanted pairs are found and meet the tolerance."""
        if self.size < self._k or self._surely_inaccurate(tol).any():
            return False
        return bool(self._accurate(tol).all()) and not self._is_rivalled(tol)

    def meets(self, tol: float) -> bool:
        """Whether pairs that are accurate enough to stop meet the tolerance itself, not just `noise`.

        A value within that is zero as far as these products can tell; nothing relative to it can be asked.
        """
        self._measure()
        magnitudes = np.abs(self.values[: self._k])
        return bool(((self.bounds <= tol * magnitudes) | (magnitudes <= self.noise)).all())

    def direction(self, tol: float) -> Tensor:
        """Where the space is wrong: the residual of the first wanted pair that is (surely) not accurate yet."""
        hopeless = self._surely_inaccurate(tol)
        if hopeless.any():
            return self._residuals_of([int(hopeless.argmax())])[0]
        accurate = self._accurate(tol)
        if accurate.all() and self.size > self._k:
            return self._residuals_of([self._k + int(self._reach().argmax())])[0]
        return self._residual_vectors[int(np.argmin(accurate))]  # of the first that is not

    def is_invariant(self) -> bool:
        """Whether all pairs are exact up to rounding, so that products lead nowhere new."""
        self._measure()
        limit = 20 * self.noise  # rounding errors of a few steps
        if float(self.residuals.max()) > limit:
            return False
        return float(self._norms_of(self._residuals_of(list(range(self.size)))).max()) <= limit

    def agrees_with(self, settled: Array, tol: float) -> bool:
        """Whether the wanted values are what they were."""
        return np.allclose(settled, self.values[: self._k], rtol=tol, atol=self.noise)

    def is_unreached_since(self, first: int, tol: float) -> bool:
        """Whether the vectors added from `first` on, each the product of the one before, lead to nothing wanted."""
        theta, coordinates = np.linalg.eigh(self._projected[first : self.size, first : self.size])
        # The next vector's length, ||product||^2 less its part in the basis, times the last coordinate: the residual.
        last = self.size - 1
        square = self._gram[last, last] - (self._projected[: self.size, last] ** 2).sum()
        reach = _wantedness(theta, self._which) + REACH * max(square, 0.0) ** 0.5 * np.abs(coordinates[-1])
        wanted = _wantedness(self.values[self._k - 1 : self._k], self._which)[0]
        return bool(reach.max() <= wanted + max(tol * abs(wanted), self.noise))

    def make_room(self, vectors: int) -> int:
        """Compress if fewer than so many vectors fit; how many fit now."""
        if self.size + vectors > self._capacity < self._operator.size:
            self._compress()
        return self._capacity - self.size

    @property
    def noise(self) -> float:
        """Rounding errors of a product; no residual can be asked to fall below. The factor is ours."""
        return 50 * torch.finfo(self._operator.dtype).eps * self._scale

    def result(self, *, converged: bool) -> EigenResult:
        """The pairs to keep; converged refers to the k wanted ones."""
        self._measure()
        count = min(self._keep, self.size)
        norms = self._norms_of(self._residuals_of(list(range(count))))
        bounds = norms.copy()
        bounds[: len(self.bounds)] = self.bounds
        return EigenResult(
            values=self._on_device(self.values[:count] * self._unit),
            vectors=self._basis.combine(self._on_device(self._coordinates[:, :count]).T).T,
            residuals=self._on_device(norms * self._unit),
            error_bounds=self._on_device(bounds * self._unit),
            matvecs=self.matvecs,
            converged=converged,
            history=tuple(value * self._unit for value in self._history),
            direction=self._residual_vectors[0] * self._unit,
        )

    def _scaled(self, product: Tensor) -> Tensor:
        if self._unit == 0:
            # One more transfer, for the first product only. A power of two: no rounding.
            largest = float(product.abs().max())
            if not math.isfinite(largest):
                raise NonFiniteError(NON_FINITE_PRODUCT)
            self._unit = 2.0 ** math.frexp(largest)[1]
        return product / self._unit

    def _compress(self) -> None:
        """Thick restart: keep the best Ritz vectors and as many again, for the sake of convergence."""
        keep = min(self.size - 1, max(self._keep, self._capacity // 2))
        kept = self._coordinates[:, :keep]
        self._gram[:keep, :keep] = kept.T @ self._gram[: self.size, : self.size] @ kept
        mix = self._on_device(kept).T
        self._basis.replace(mix)
        self._products.replace(mix)
        self._projected[:] = 0
        self._projected[:keep, :keep] = np.diag(self.values[:keep])
        self._solve()

    def _limits(self, tol: float) -> Array:
        """Largest residuals of the wanted pairs."""
        magnitudes = np.abs(self.values[: self._k])
        cap = max(tol, min(self._evidence.cap, (tol / 10) ** 0.5))
        spread = SPREAD_SHARE * float(self.values.max() - self.values.min())
        angle = self._evidence.angle * self._gap(tol) if self._k == 1 else math.inf
        limits: Array = np.maximum(np.minimum(cap * magnitudes, min(spread, angle)), self.noise)
        return limits

    def _gap(self, tol: float) -> float:
        """From the first value to the next that is another answer: not one that agrees with it within the tolerance."""
        distances = np.abs(self.values[1:] - self.values[0])
        others = distances[distances > tol * abs(self.values[0])]
        return float(others.min()) if len(others) else math.inf

    def _surely_inaccurate(self, tol: float) -> npt.NDArray[np.bool_]:
        surely: npt.NDArray[np.bool_] = self._rough[: self._k] - self._roughness > self._limits(tol)
        return surely

    def _accurate(self, tol: float) -> npt.NDArray[np.bool_]:
        self._measure()
        within = self.bounds <= np.maximum(tol * np.abs(self.values[: self._k]), self.noise)
        accurate: npt.NDArray[np.bool_] = within & (self.residuals <= self._limits(tol))
        return accurate

    def _is_rivalled(self, tol: float) -> bool:
        """Whether an unwanted pair might, within its residual, still outdo the last of several wanted ones."""
        if self._k == 1 or self.size <= self._k:
            return False
        last = _wantedness(self.values[self._k - 1 : self._k], self._which)[0]
        return bool(self._reach().max() > last + max(tol * abs(last), self._roughness))

    def _reach(self) -> Array:
        """How wanted the unwanted pairs might be."""
        reach: Array = (_wantedness(self.values, self._which) + self._rough)[self._k :]
        return reach

    @property
    def _roughness(self) -> float:
        """Rounding errors of a residual that is the root of a difference of squares."""
        return float(3 * torch.finfo(self._operator.dtype).eps ** 0.5 * self._scale)

    def _residuals_of(self, columns: list[int]) -> Tensor:
        coordinates = self._coordinates[:, columns]
        residuals = self._products.combine(self._on_device(coordinates).T)
        return residuals.sub_(self._basis.combine(self._on_device(coordinates * self.values[columns]).T))

    def _norms_of(self, rows: Tensor) -> Array:
        norms: Array = torch.linalg.vector_norm(rows, dim=1).to("cpu", torch.float64).numpy()
        return norms

    def _on_device(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._operator.device, self._operator.dtype)


def _orthogonal_part(direction: Tensor, basis: Rows) -> Tensor | None:
    """The unit vector along the part of `direction` outside the span of the orthonormal rows; None without one."""
    unit: Tensor = direction / direction.norm()
    for _ in range(3):
        unit = unit - basis.combine(basis.dot(unit))
        remainder = unit.norm()
        unit = unit / remainder
        # Host synchronisation, on a number the loop depends on. "Twice is enough" (Kahan): no cancellation, no repeat.
        left = float(remainder)
        if not left > 10 * torch.finfo(unit.dtype).eps:
            return None
        if left > 0.7:
            break
    return unit


def _order(theta: Array, which: Which) -> npt.NDArray[np.intp]:
    """Indices from the most to the least wanted of ascending `theta`."""
    if which == "SA":
        return np.arange(len(theta))
    if which == "LA":
        return np.arange(len(theta))[::-1]
    magnitudes = np.abs(theta)
    # Of a tie (+3 and -3, up to rounding) the positive one comes first, so that the answer does not hang on the seed.
    return np.argsort(-magnitudes - (theta > 0) * (TIE * magnitudes.max()), kind="stable")


def _wantedness(values: Array, which: Which) -> Array:
    return {"LM": np.abs(values), "LA": values, "SA": -values}[which]


def _neighbours(values: Array, wanted: int) -> list[int]:
    """Indices of the values next above and next below each of the first `wanted`."""
    by_value = np.argsort(values).tolist()
    place = {index: position for position, index in enumerate(by_value)}
    found = {by_value[p] for i in range(wanted) for p in (place[i] - 1, place[i] + 1) if 0 <= p < len(by_value)}
    return sorted(found)


def _error_bounds(values: Array, known: list[int], residuals: Array, wanted: int) -> Array:
    """min(r, r^2/gap) of the first `wanted` values; `known` are those with a residual, the nearest ones among them."""
    distances = np.abs(values[:wanted, None] - values[None, known]) - residuals[None, :]
    distances[np.arange(wanted), np.arange(wanted)] = np.inf
    # One Ritz value alone has no neighbour to take a gap from: only the linear bound is known.
    gap = distances.min(axis=1)
    gap = np.where(np.isinf(gap) | (gap < 0), 0.0, gap)
    r = residuals[:wanted]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds: Array = np.where(gap > 0, np.minimum(r, r * r / gap), r)
    return bounds
