"""Ritz pairs of an operator on a growing basis, and what their residuals say; see lanczos.py for
the method.

A basis V with its products W = A V is kept, so projections, Ritz pairs and residuals cost no
further product.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.curvature.basis import Rows
from hessianflow.curvature.evidence import (
    FEW_ROWS,
    REACH,
    ROUNDING,
    SPREAD_SHARE,
    ZERO,
    Array,
    Demand,
    estimated_errors,
    neighbours,
    order,
    wantedness,
)
from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.interfaces import HessianFlowError, LinearOperator

ASYMMETRY = 0.1
"""Relative difference of V^T A V from its transpose that is put down to rounding. Ours: products in
bfloat16 differ by a hundredth."""


class RitzSpace:
    """The basis, its products, and the Ritz pairs of the operator on it.

    All numbers are in units of a power of two near the first product, so that squares neither
    vanish nor overflow.
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
        self._operator, self._which, self._k, self._keep = operator, which, k, keep
        self._demand = demand
        self._tie = max(demand.tie, ROUNDING * torch.finfo(operator.dtype).eps)
        self._capacity = min(operator.size, capacity)
        self._basis, self._products = (Rows(operator, self._capacity) for _ in range(2))
        self._projected = np.zeros((self._capacity, self._capacity))
        self._gram = np.zeros((self._capacity, self._capacity))
        self._unit = 0.0
        self._scale = 0.0  # largest magnitude seen, also of values that a restart has dropped
        self._before = 0.0  # residual of the leading pair as it was without the vector added last
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
        """Add the part of `direction` orthogonal to the basis and its product; False if there is no
        such part."""
        unit = _orthogonal_part(direction, self._basis)
        if unit is None:
            return False
        if self.size == self._capacity:
            self._compress()
        product = self._scaled(self._operator.matvec(unit))
        m, self.matvecs = self.size, self.matvecs + 1
        self._basis.append(unit)
        self._products.append(product)
        # The one transfer to the host per product: 2 (m + 1) numbers, on which the stopping rule
        # depends.
        numbers = torch.cat([self._basis.dot(product), self._products.dot(product)])
        column, gram = numbers.to("cpu", torch.float64).numpy().reshape(2, m + 1)
        if not np.isfinite(column).all():
            raise NonFiniteError(NON_FINITE_PRODUCT)
        # That residual's part along the new vector: all of it where the search followed this pair.
        self._before = abs(float(column[:m] @ self._coordinates[:, 0])) if m > 0 else 0.0
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self._gram[: m + 1, m] = self._gram[m, : m + 1] = gram
        self._solve()
        self._history.append(float(self.values[0]))
        return True

    def _solve(self) -> None:
        """Find Ritz values in the wanted order, the vectors' coordinates, and what is known of
        residuals for free."""
        theta, coordinates = np.linalg.eigh(self._projected[: self.size, : self.size])
        self._scale = max(self._scale, float(np.abs(theta).max()))
        places = order(theta, self._which, self._tie)
        self.values, self._coordinates = theta[places], coordinates[:, places]
        # ||W s - theta V s||^2 = s^T (W^T W) s - theta^2: too rough to accept a pair by, but it
        # costs no vectors.
        squares = (
            (self._gram[: self.size, : self.size] @ self._coordinates) * self._coordinates
        ).sum(axis=0)
        self._rough = np.sqrt(np.maximum(squares - self.values**2, 0))
        self._is_measured = False

    def _measure(self) -> None:
        """Measure residuals and estimated errors of the wanted pairs, once for each set of Ritz
        pairs."""
        if self._is_measured:
            return
        wanted = min(self._k, self.size)
        columns = sorted({*range(wanted), *neighbours(self.values, wanted)})
        self._residual_vectors = self._residuals_of(columns)
        norms = self._norms_of(self._residual_vectors)
        self.residuals = norms[:wanted]
        self._estimates = estimated_errors(self.values, columns, norms, wanted)
        self._is_measured = True

    def is_accurate(self) -> bool:
        """Return whether all k wanted pairs are found and accurate enough to stop."""
        if self._operator.size <= FEW_ROWS and not self.is_complete:
            return False
        if self.size < self._k or self._surely_inaccurate().any():
            return False
        return bool(self._accurate().all()) and self._rival() is None

    def meets_demand(self) -> bool:
        """Return whether pairs that are accurate enough to stop meet the tolerances, not just
        `noise`.

        A value that would vanish in a sum with the largest is zero; no relative error is asked of
        it.
        """
        magnitudes = np.abs(self.values[: self._k])
        good = self._bounds() <= self._demand.tol * magnitudes
        good &= self.residuals <= self._demand.largest_residual(magnitudes)
        return bool((good | (magnitudes <= ZERO / ROUNDING * self.noise)).all())

    def direction(self) -> Tensor:
        """Return where the space is wrong: the residual of the first wanted pair that is (surely)
        not accurate yet."""
        hopeless = self._surely_inaccurate()
        if hopeless.any():
            return self._residuals_of([int(hopeless.argmax())])[0]
        accurate = self._accurate()
        rival = self._rival() if accurate.all() else None
        if rival is not None:
            return self._residuals_of([rival])[0]
        return self._residual_vectors[int(np.argmin(accurate))]  # of the first that is not

    def is_invariant(self) -> bool:
        """Return whether all pairs are exact up to rounding, so that products lead nowhere new."""
        self._measure()
        limit = 20 * self.noise  # rounding errors of a few steps
        if float(self.residuals.max()) > limit:
            return False
        return float(self._norms_of(self._residuals_of(list(range(self.size)))).max()) <= limit

    def agrees_with(self, settled: Array) -> bool:
        """Return whether the wanted values are what they were."""
        return np.allclose(settled, self.values[: self._k], rtol=self._demand.tol, atol=self.noise)

    def is_unreached_since(self, first: int) -> bool:
        """Return whether the vectors added from `first` on, each the product of the one before,
        lead to nothing wanted."""
        theta, coordinates = np.linalg.eigh(self._projected[first : self.size, first : self.size])
        # The next vector's length, ||product||^2 less its part in the basis, times the last
        # coordinate: the residual.
        last = self.size - 1
        square = self._gram[last, last] - (self._projected[: self.size, last] ** 2).sum()
        reach = self._wantedness(theta) + REACH * max(square, 0.0) ** 0.5 * np.abs(coordinates[-1])
        wanted = self._wantedness(self.values)[self._k - 1]
        return bool(reach.max() <= wanted + max(self._demand.tol * abs(wanted), self.noise))

    def make_room(self, vectors: int) -> int:
        """Compress if fewer than this many vectors fit, and return how many fit now."""
        if self.size + vectors > self._capacity < self._operator.size:
            self._compress()
        return self._capacity - self.size

    @property
    def noise(self) -> float:
        """Rounding errors of a product; no residual can be asked to fall below."""
        return ROUNDING * torch.finfo(self._operator.dtype).eps * self._scale

    def result(self, *, converged: bool) -> EigenResult:
        """Return the pairs to keep; converged refers to the k wanted ones.

        Raises:
            HessianFlowError: not converged, and the operator is not symmetric.
        """
        self._measure()
        if not converged:
            self._check_symmetric()
        count = min(self._keep, self.size)
        norms = self._norms_of(self._residuals_of(list(range(count))))
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

    def _check_symmetric(self) -> None:
        """Refuse an operator that is not symmetric; asked where a search ends without an answer.

        The search itself looks at one half of the projection V^T A V only.
        """
        rows = [self._basis.dot(self._products[index]) for index in range(self.size)]
        projected = torch.stack(rows)
        difference = float((projected - projected.T).norm())
        share = difference / max(float(projected.norm()), torch.finfo(projected.dtype).tiny)
        if share > ASYMMETRY:
            raise HessianFlowError(
                f"the operator is not symmetric: u.(A v) and v.(A u) differ by {share:.0%} of their"
                " size on the vectors of the search; pass a symmetric one, such as (A + A^T) / 2,"
                " and of a model look for an operation whose second derivative overflows or is"
                " wrong (check_product=True)"
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
        """Restart thickly: keep the best Ritz vectors and as many again, for the sake of
        convergence."""
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
        """Return the largest residuals of the wanted pairs."""
        magnitudes = np.abs(self.values[: self._k])
        most = SPREAD_SHARE * float(self.values.max() - self.values.min())
        if self._k == 1:
            forecast = self._demand.largest_forecast(float(magnitudes[0]), self._before)
            most = min(most, self._demand.evidence.angle * self._gap(), forecast)
        limits: Array = np.minimum(self._demand.largest_residual(magnitudes), most)
        return np.maximum(limits, self.noise)

    def _gap(self) -> float:
        """Return the gap from the first value to the next that does not agree with it within the
        tolerance."""
        distances = np.abs(self.values[1:] - self.values[0])
        others = distances[distances > self._demand.tol * abs(self.values[0])]
        return float(others.min()) if len(others) else math.inf

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
        """Return errors that values of accurate pairs may have: the residual, or at least what was
        asked.

        The gap in r^2/gap is that of values seen; between eigenvalues closer than the tolerance it
        means nothing.
        """
        self._measure()
        asked = self._demand.tol * np.abs(self.values[: self._k])
        bounds: Array = np.maximum(self._estimates, np.minimum(self.residuals, asked))
        return np.maximum(bounds, self.noise)

    def _rival(self) -> int | None:
        """Return an unwanted pair that might, within its residual, still outdo the last wanted one.

        A single pair has it among those of the other sign: both ends of a spectrum may lie equally
        far from zero.
        """
        if self.size <= self._k or (self._k == 1 and self._which != "LM"):
            return None
        wanted = self._wantedness(self.values)
        last, reach = wanted[self._k - 1], (wanted + self._rough)[self._k :]
        if self._k > 1:
            most = last + max(self._demand.tol * abs(last), self._roughness)
            return self._k + int(reach.argmax()) if reach.max() > most else None
        most, others = last * (1 + self._tie / 2), np.flatnonzero(self.values * self.values[0] < 0)
        if len(others) == 0:
            return None
        rival = int(others[0])
        # Where it matters the residual is measured: the rough one may be off by more than a tie.
        if wanted[rival] + REACH * (self._rough[rival] + self._roughness) <= most:
            return None
        residual = self._norms_of(self._residuals_of([rival]))[0]
        return rival if wanted[rival] + REACH * residual > most else None

    def _wantedness(self, values: Array) -> Array:
        return wantedness(values, self._which, self._tie)

    @property
    def _roughness(self) -> float:
        """Rounding errors of a residual that is the root of a difference of squares."""
        return float(3 * torch.finfo(self._operator.dtype).eps ** 0.5 * self._scale)

    def _residuals_of(self, columns: list[int]) -> Tensor:
        coordinates = self._coordinates[:, columns]
        residuals = self._products.combine(self._on_device(coordinates).T)
        return residuals.sub_(
            self._basis.combine(self._on_device(coordinates * self.values[columns]).T)
        )

    def _norms_of(self, rows: Tensor) -> Array:
        norms: Array = torch.linalg.vector_norm(rows, dim=1).to("cpu", torch.float64).numpy()
        return norms

    def _on_device(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(
            self._operator.device, self._operator.dtype
        )


def _orthogonal_part(direction: Tensor, basis: Rows) -> Tensor | None:
    """Return the unit vector along the part of `direction` outside the span of the orthonormal
    rows; None without one."""
    unit: Tensor = direction / direction.norm()
    for _ in range(3):
        unit = unit - basis.combine(basis.dot(unit))
        remainder = unit.norm()
        unit = unit / remainder
        # Host synchronisation, on a number the loop depends on. "Twice is enough" (Kahan): no
        # cancellation, no repeat.
        left = float(remainder)
        if not left > 10 * torch.finfo(unit.dtype).eps:
            return None
        if left > 0.7:
            break
    return unit
