"""Ritz pairs of an operator on a growing basis, and judgements from their residuals.

A basis V with its products W = A V is kept, so projections, Ritz pairs and residuals cost no
further product. lanczos.py describes the method.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.curvature.basis import Rows, check_symmetric, norms_of, orthogonal_part
from hessianflow.curvature.evidence import (
    FEW_ROWS,
    REACH,
    ROUNDING,
    SPREAD_SHARE,
    ZERO,
    Array,
    Demand,
    estimated_errors,
    gap_of_first,
    neighbours,
    order,
    wantedness,
)
from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.interfaces import LinearOperator


class RitzSpace:
    """The basis, its products, and the Ritz pairs of the operator on it.

    All numbers are in units of a power of two near the first product, so that squares neither
    vanish nor overflow. The `k` pairs at the end `which` are wanted with the accuracy `demand`; a
    restart keeps, and `result` returns, `keep` >= k. The basis holds at most `capacity` vectors.
    """

    def __init__(
        self,
        operator: LinearOperator,
        which: Which,
        k: int,
        keep: int,
        capacity: int,
        demand: Demand,
    ) -> None:
        self._operator = operator
        self._which: Which = which
        self._k = k
        self._keep = keep
        self._demand = demand
        self._tie = max(demand.tie, ROUNDING * torch.finfo(operator.dtype).eps)
        self._capacity = min(operator.size, capacity)
        self._basis = Rows(operator, self._capacity)
        self._products = Rows(operator, self._capacity)
        self._projected = np.zeros((self._capacity, self._capacity))
        self._gram = np.zeros((self._capacity, self._capacity))
        self._unit = 0.0
        self._scale = 0.0  # largest magnitude seen, also of values that a restart has dropped
        self._before = 0.0  # residual of the leading pair before the last vector was added
        self._history: list[float] = []
        self.matvecs = 0

    @property
    def size(self) -> int:
        """Return the number of vectors in the basis."""
        return self._basis.size

    @property
    def is_complete(self) -> bool:
        """Return whether the basis spans everything."""
        return self.size == self._operator.size

    @property
    def wanted(self) -> Array:
        """Return the wanted values, in units of this space."""
        values: Array = self.values[: self._k].copy()
        return values

    @property
    def last_product(self) -> Tensor:
        """Return the product of the vector added last, along which Lanczos goes on."""
        return self._products[self.size - 1]

    def extend(self, direction: Tensor) -> bool:
        """Add the part of `direction` outside the basis; return False if there is none."""
        unit = orthogonal_part(direction, self._basis)
        if unit is None:
            return False
        if self.size == self._capacity:
            self._compress()
        product = self._scaled(self._operator.matvec(unit))
        self.matvecs += 1
        m = self.size
        self._basis.append(unit)
        self._products.append(product)
        # The only wait for the device per product: the stopping rule needs these 2 (m + 1) numbers.
        numbers = torch.cat([self._basis.dot(product), self._products.dot(product)])
        column, gram = numbers.to("cpu", torch.float64).numpy().reshape(2, m + 1)
        if not np.isfinite(column).all():
            raise NonFiniteError(NON_FINITE_PRODUCT)
        if m > 0:
            # The residual's part along the new vector, which is all of it where the search followed
            # this pair.
            self._before = abs(float(column[:m] @ self._coordinates[:, 0]))
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self._gram[: m + 1, m] = self._gram[m, : m + 1] = gram
        self._solve()
        self._history.append(float(self.values[0]))
        return True

    def _solve(self) -> None:
        """Compute Ritz values in the wanted order, coordinates, and rough norms of residuals."""
        theta, coordinates = np.linalg.eigh(self._projected[: self.size, : self.size])
        self._scale = max(self._scale, float(np.abs(theta).max()))
        indices = order(theta, self._which, self._tie)
        self.values = theta[indices]
        self._coordinates = coordinates[:, indices]
        # ||W s - theta V s||^2 = s^T (W^T W) s - theta^2. The difference cancels, so it is too
        # rough to accept a pair by, but it needs no vector of full length.
        gram = self._gram[: self.size, : self.size]
        squares = ((gram @ self._coordinates) * self._coordinates).sum(axis=0)
        self._rough = np.sqrt(np.maximum(squares - self.values**2, 0))
        self._is_measured = False

    def _measure(self) -> None:
        """Measure residuals and errors of the wanted pairs, once for each set of Ritz pairs."""
        if self._is_measured:
            return
        wanted = min(self._k, self.size)
        columns = sorted({*range(wanted), *neighbours(self.values, wanted)})
        self._residual_vectors = self._residuals_of(columns)
        norms = norms_of(self._residual_vectors)
        self.residuals = norms[:wanted]
        self._estimates = estimated_errors(self.values, columns, norms, wanted)
        self._is_measured = True

    def is_accurate(self) -> bool:
        """Return whether all k wanted pairs are accurate enough to stop."""
        if self._operator.size <= FEW_ROWS and not self.is_complete:
            return False
        # The rough norms come first: most steps end here, without a residual of full length.
        if self.size < self._k or self._surely_inaccurate().any():
            return False
        return bool(self._accurate().all()) and self._rival() is None

    def meets_demand(self) -> bool:
        """Return whether pairs that are accurate enough to stop meet the tolerances as well.

        They may have stopped at `noise` instead. A value that would vanish in a sum with the
        largest is zero, and no relative error is asked of it.
        """
        magnitudes = np.abs(self.values[: self._k])
        good = self._bounds() <= self._demand.tol * magnitudes
        good &= self.residuals <= self._demand.largest_residual(magnitudes)
        return bool((good | (magnitudes <= ZERO / ROUNDING * self.noise)).all())

    def direction(self) -> Tensor:
        """Return the residual of the first wanted pair, or of a rival, that is not accurate yet."""
        inaccurate = self._surely_inaccurate()
        if inaccurate.any():
            return self._residuals_of([int(inaccurate.argmax())])[0]
        accurate = self._accurate()
        if accurate.all():
            rival = self._rival()
            if rival is not None:
                return self._residuals_of([rival])[0]
        return self._residual_vectors[int(np.argmin(accurate))]

    def is_invariant(self) -> bool:
        """Return whether all pairs are exact up to rounding, so that no product leads outside."""
        self._measure()
        limit = 20 * self.noise  # rounding errors of a few steps
        if float(self.residuals.max()) > limit:
            return False
        return float(norms_of(self._residuals_of(list(range(self.size)))).max()) <= limit

    def agrees_with(self, settled: Array) -> bool:
        """Return whether the wanted values equal some earlier ones within the tolerance."""
        return np.allclose(settled, self.values[: self._k], rtol=self._demand.tol, atol=self.noise)

    def is_unreached_since(self, first: int) -> bool:
        """Return whether the vectors from `first` on, a Lanczos chain, lead to nothing wanted."""
        theta, coordinates = np.linalg.eigh(self._projected[first : self.size, first : self.size])
        # A residual is the next vector's length times the last coordinate; the square of that
        # length is ||product||^2 less the square of the product's part in the basis.
        last = self.size - 1
        square = self._gram[last, last] - (self._projected[: self.size, last] ** 2).sum()
        reach = self._wantedness(theta) + REACH * max(square, 0.0) ** 0.5 * np.abs(coordinates[-1])
        wanted = self._wantedness(self.values)[self._k - 1]
        return bool(reach.max() <= wanted + max(self._demand.tol * abs(wanted), self.noise))

    def make_room(self, vectors: int) -> int:
        """Make room for `vectors` by a restart if it is needed, and return the number that fits."""
        if self.size + vectors > self._capacity < self._operator.size:
            self._compress()
        return self._capacity - self.size

    @property
    def noise(self) -> float:
        """Return the rounding error of a product, below which no residual can fall."""
        return ROUNDING * torch.finfo(self._operator.dtype).eps * self._scale

    def result(self, *, converged: bool) -> EigenResult:
        """Return the pairs to keep; `converged` refers to the k wanted ones.

        Without convergence, HessianFlowError says if the operator is not symmetric.
        """
        self._measure()
        if not converged:
            # The search looks at one half of the projection V^T A V only.
            check_symmetric(self._basis, self._products)
        count = min(self._keep, self.size)
        norms = norms_of(self._residuals_of(list(range(count))))
        bounds = np.maximum(norms, self.noise)
        if converged:
            bounds[: self._k] = self._bounds()
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
            # The host waits once more, for the first product only. Dividing by a power of two
            # rounds nothing.
            largest = float(product.abs().max())
            if not math.isfinite(largest):
                raise NonFiniteError(NON_FINITE_PRODUCT)
            self._unit = 2.0 ** math.frexp(largest)[1]
        return product / self._unit

    def _compress(self) -> None:
        """Restart with the best Ritz vectors; keeping half of them speeds up convergence."""
        keep = min(self.size - 1, max(self._keep, self._capacity // 2))
        kept = self._coordinates[:, :keep]
        self._gram[:keep, :keep] = kept.T @ self._gram[: self.size, : self.size] @ kept
        mix = self._on_device(kept).T
        self._basis.replace(mix)
        self._products.replace(mix)
        self._projected[:] = 0
        self._projected[:keep, :keep] = np.diag(self.values[:keep])
        self._solve()

    def _limits(self) -> Array:
        """Return the largest residuals with which the wanted pairs are accepted."""
        magnitudes = np.abs(self.values[: self._k])
        most = SPREAD_SHARE * float(self.values.max() - self.values.min())
        if self._k == 1:
            forecast = self._demand.largest_forecast(float(magnitudes[0]), self._before)
            gap = gap_of_first(self.values, self._demand.tol)
            most = min(most, self._demand.evidence.angle * gap, forecast)
        limits: Array = np.minimum(self._demand.largest_residual(magnitudes), most)
        return np.maximum(limits, self.noise)

    def _surely_inaccurate(self) -> npt.NDArray[np.bool_]:
        surely: npt.NDArray[np.bool_] = self._rough[: self._k] - self._roughness > self._limits()
        return surely

    def _accurate(self) -> npt.NDArray[np.bool_]:
        self._measure()
        asked = self._demand.tol * np.abs(self.values[: self._k])
        within = self._estimates <= np.maximum(asked, self.noise)
        accurate: npt.NDArray[np.bool_] = within & (self.residuals <= self._limits())
        return accurate

    def _bounds(self) -> Array:
        """Return bounds on the errors of accurate pairs.

        They are at least the tolerance or, if smaller, the residual: r^2/gap rests on the gap to
        the values seen, which means nothing between eigenvalues closer than the tolerance.
        """
        self._measure()
        asked = self._demand.tol * np.abs(self.values[: self._k])
        bounds: Array = np.maximum(self._estimates, np.minimum(self.residuals, asked))
        return np.maximum(bounds, self.noise)

    def _rival(self) -> int | None:
        """Return an unwanted pair that may, within its residual, still outdo the last wanted one.

        For a single pair these are those of the other sign: both ends of a spectrum may lie equally
        far from zero.
        """
        if self.size <= self._k:
            return None
        if self._k == 1:
            return self._rival_of_other_sign()
        wanted = self._wantedness(self.values)
        last = wanted[self._k - 1]
        reach = (wanted + self._rough)[self._k :]
        if not reach.max() > last + max(self._demand.tol * abs(last), self._roughness):
            return None
        return self._k + int(reach.argmax())

    def _rival_of_other_sign(self) -> int | None:
        others = np.flatnonzero(self.values * self.values[0] < 0)
        if self._which != "LM" or len(others) == 0:
            return None
        rival = int(others[0])
        wanted = self._wantedness(self.values)
        most = wanted[0] * (1 + self._tie / 2)
        if wanted[rival] + REACH * (self._rough[rival] + self._roughness) <= most:
            return None
        # Only here is the residual measured: the rough one may be off by more than a tie.
        residual = norms_of(self._residuals_of([rival]))[0]
        if not wanted[rival] + REACH * residual > most:
            return None
        return rival

    def _wantedness(self, values: Array) -> Array:
        return wantedness(values, self._which, self._tie)

    @property
    def _roughness(self) -> float:
        """Return the rounding error of a rough residual, the root of a difference of squares."""
        return float(3 * torch.finfo(self._operator.dtype).eps ** 0.5 * self._scale)

    def _residuals_of(self, columns: list[int]) -> Tensor:
        coordinates = self._coordinates[:, columns]
        products = self._products.combine(self._on_device(coordinates).T)
        scaled = self._basis.combine(self._on_device(coordinates * self.values[columns]).T)
        return products.sub_(scaled)

    def _on_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._operator.device, self._operator.dtype)
