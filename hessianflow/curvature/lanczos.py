"""Thick-restart Lanczos with full reorthogonalisation, stopped by the residuals of the wanted pairs.

References: Lanczos 1950; Golub and Van Loan, Matrix Computations, section 10; Wu and Simon, Thick-restart Lanczos
method for large symmetric eigenvalue problems, 2000; Davidson 1975 for a start from several vectors.

A basis V with its products W = A V is kept. Each step projects (T = V^T W), takes the Ritz pairs (theta, x = V s) of T,
and extends V by the residual A x - theta x = W s - theta V s of the first wanted pair that is not accurate yet,
orthogonalised against all of V (no ghost copies). From one start vector all residuals are parallel to the next Lanczos
vector, so this is Lanczos; from several it is the same idea on a block (Davidson without preconditioner). A full basis
is compressed to its best Ritz vectors, at no product (thick restart).

Choices of ours:
- Stopping: residual r, and gap to the nearest other Ritz value less that one's residual. A pair is accepted when
  min(r, r^2/gap) <= tol |value| and r <= cap |value|, cap = max(tol, min(0.01, sqrt(tol/10))). r is a theorem;
  r^2/gap is its quadratic refinement (Temple, Kato); the cap keeps it from trusting a gap estimated too early (with
  0.03, values 17 % low were accepted on a spectrum with three close outliers). For several wanted pairs 0.002 stands in
  place of 0.01, and no unwanted pair may reach a wanted one within its residual (else an inner
  one may be hidden: 11 % off in the top five of a ResNet-20).
- Breakdown (all residuals at rounding level): the space found is invariant. Fresh random directions continue the search
  until pairs are complete and such a direction, followed to its own breakdown, has changed none of them.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.vectors import gaussian
from hessianflow.interfaces import LinearOperator

RESIDUAL_CAP = 0.01
"""Largest residual, relative to its value, for which the quadratic bound is trusted. Ours, measured."""

RESIDUAL_CAP_SEVERAL = 0.002
"""The same for more than one pair, where an inner one may still be hidden: with 0.01, 3 of 24 runs for the top five of
a small MLP missed one of two values 1.5 % apart, with 0.002 one of 24, for 5 % more products. Ours, measured."""

Array = npt.NDArray[np.float64]

TIE = 1e-6
"""Magnitudes that differ by less than this share of the largest count as equal. Ours: rounding of float32 products."""


def lanczos(
    operator: LinearOperator,
    k: int,
    *,
    which: Which,
    tol: float,
    max_matvecs: int,
    start: Tensor,
    source: torch.Generator,
    extra: int = 0,
    max_basis: int | None = None,
) -> EigenResult:
    """The k most wanted eigenpairs; see :func:`~hessianflow.curvature.eigenpairs.top_eigenpairs` for the arguments.

    Args:
        start: start vectors, shape [size, s]; those that depend on earlier ones are left out.
        source: generator of the directions tried after a breakdown.
        extra: further Ritz pairs to return after the wanted ones, however accurate (for a later warm start).
        max_basis: vectors kept at once (and as many products); default max(2k + 20, 40). Ours.
    """
    capacity = min(operator.size, max(max_basis or max(2 * k + 20, 40), k + extra + 2))
    space = _RitzSpace(operator, which, k, capacity)
    history: list[float] = []
    seeds, settled = list(start.unbind(1)), None
    while space.matvecs < max_matvecs and space.size < operator.size:
        if seeds:
            extended = space.extend(seeds.pop(0))
        else:
            if space.is_full:
                space.compress(k + extra)
            direction = space.direction(tol) if settled is None else space.worst_direction()
            extended = space.extend(direction) or space.extend(gaussian(operator, source))
        if extended:
            space.solve()
            history.append(float(space.values[0]))
        if seeds or (settled is None and not space.is_accurate(tol)):
            continue
        if not space.is_invariant():
            if settled is None:
                break
            continue
        # Invariant, so blind to what the start had no part in (the second of two equal eigenvalues): look outside.
        if settled is not None and np.allclose(settled, space.values[:k], rtol=tol, atol=space.noise):
            break
        settled, seeds = space.values[:k].copy(), [gaussian(operator, source)]
    return space.result(k + extra, tol, tuple(history))


class _RitzSpace:
    """The basis, its products, and the Ritz pairs of the operator on it."""

    def __init__(self, operator: LinearOperator, which: Which, k: int, capacity: int) -> None:
        self._operator, self._which, self._k, self._capacity = operator, which, k, capacity
        self._basis = torch.empty(min(8, capacity), operator.size, dtype=operator.dtype, device=operator.device)
        self._products = torch.empty_like(self._basis)
        self._projected = np.zeros((capacity, capacity))
        self._gram = np.zeros((capacity, capacity))
        self._scale = 0.0  # largest magnitude seen, also of values that a restart has dropped
        self.size = 0
        self.matvecs = 0

    @property
    def is_full(self) -> bool:
        return self.size == self._capacity

    def extend(self, direction: Tensor) -> bool:
        """Add the part of `direction` orthogonal to the basis and its product; False if there is no such part."""
        basis = self._basis[: self.size]
        unit = _orthogonal_part(direction, basis)
        if unit is None:
            return False
        self._grow()
        product = self._operator.matvec(unit)
        m, self.size, self.matvecs = self.size, self.size + 1, self.matvecs + 1
        self._basis[m], self._products[m] = unit, product
        # The one transfer to the host per product: 2 (m + 1) numbers, on which the stopping rule depends.
        numbers = torch.cat([self._basis[: m + 1] @ product, self._products[: m + 1] @ product])
        column, gram = numbers.to("cpu", torch.float64).numpy().reshape(2, m + 1)
        if not np.isfinite(column).all():
            raise NonFiniteError(NON_FINITE_PRODUCT)
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self._gram[: m + 1, m] = self._gram[m, : m + 1] = gram
        return True

    def solve(self) -> None:
        """Ritz values in the wanted order, the vectors' coordinates, and residuals of the k wanted pairs."""
        theta, coordinates = np.linalg.eigh(self._projected[: self.size, : self.size])
        self._scale = max(self._scale, float(np.abs(theta).max()))
        order = _order(theta, self._which)
        self.values, self._coordinates = theta[order], coordinates[:, order]
        wanted = min(self._k, self.size)
        columns = sorted({*range(wanted), *_neighbours(self.values, wanted)})
        self._residual_vectors = self._residuals_of(columns)
        norms = self._norms_of(self._residual_vectors)
        self.residuals = norms[:wanted]
        self.bounds = _error_bounds(self.values, columns, norms, wanted)
        # ||W s - theta V s||^2 = s^T (W^T W) s - theta^2: too rough for stopping, but free for all pairs.
        squares = ((self._gram[: self.size, : self.size] @ self._coordinates) * self._coordinates).sum(axis=0)
        rough = np.sqrt(np.maximum(squares - self.values**2, 0))
        self._reach = (_wantedness(self.values, self._which) + rough)[wanted:]

    def is_accurate(self, tol: float) -> bool:
        """Whether all k wanted pairs are found and meet the tolerance."""
        return self.size >= self._k and bool(self._accurate(tol).all()) and not self._is_rivalled(tol)

    def direction(self, tol: float) -> Tensor:
        """Where the space is wrong: the residual of the first wanted pair that is not accurate yet."""
        accurate = self._accurate(tol)
        if accurate.all() and len(self._reach) > 0:
            return self._residuals_of([len(accurate) + int(self._reach.argmax())])[0]
        return self._residual_vectors[int(np.argmin(accurate))]  # of the first that is not

    def is_invariant(self) -> bool:
        """Whether all pairs are exact up to rounding, so that products lead nowhere new."""
        limit = 20 * self.noise  # rounding errors of a few steps
        if float(self.residuals.max()) > limit:
            return False
        return float(self._norms_of(self._residuals_of(list(range(self.size)))).max()) <= limit

    def worst_direction(self) -> Tensor:
        """The residual of the least accurate of all pairs."""
        residuals = self._residuals_of(list(range(self.size)))
        return residuals[int(self._norms_of(residuals).argmax())]

    @property
    def noise(self) -> float:
        """Rounding errors of a product; no residual can be asked to fall below."""
        return 50 * torch.finfo(self._operator.dtype).eps * self._scale

    def compress(self, keep: int) -> None:
        """Thick restart: keep the best Ritz vectors and as many again, for the sake of convergence."""
        keep = min(self.size - 1, max(keep, self._capacity // 2))
        kept = self._coordinates[:, :keep]
        self._gram[:keep, :keep] = kept.T @ self._gram[: self.size, : self.size] @ kept
        mix = self._on_device(kept).T
        self._basis[:keep] = mix @ self._basis[: self.size]
        self._products[:keep] = mix @ self._products[: self.size]
        self._projected[:] = 0
        self._projected[:keep, :keep] = np.diag(self.values[:keep])
        self.size = keep

    def result(self, count: int, tol: float, history: tuple[float, ...]) -> EigenResult:
        """The first `count` pairs; converged refers to the k wanted ones."""
        count = min(count, self.size)
        norms = self._norms_of(self._residuals_of(list(range(count))))
        bounds = norms.copy()
        bounds[: len(self.bounds)] = self.bounds
        return EigenResult(
            values=self._on_device(self.values[:count]),
            vectors=(self._on_device(self._coordinates[:, :count]).T @ self._basis[: self.size]).T,
            residuals=self._on_device(norms),
            error_bounds=self._on_device(bounds),
            matvecs=self.matvecs,
            converged=self.is_accurate(tol),
            history=history,
        )

    def _accurate(self, tol: float) -> npt.NDArray[np.bool_]:
        magnitudes = np.abs(self.values[: len(self.bounds)])
        cap = max(tol, min(RESIDUAL_CAP if self._k == 1 else RESIDUAL_CAP_SEVERAL, (tol / 10) ** 0.5))
        within = self.bounds <= np.maximum(tol * magnitudes, self.noise)
        accurate: npt.NDArray[np.bool_] = within & (self.residuals <= np.maximum(cap * magnitudes, self.noise))
        return accurate

    def _is_rivalled(self, tol: float) -> bool:
        """Whether an unwanted pair might, within its residual, still outdo the last of several wanted ones."""
        if self._k == 1 or len(self._reach) == 0:
            return False
        last = _wantedness(self.values[self._k - 1 : self._k], self._which)[0]
        rounding = 3 * torch.finfo(self._operator.dtype).eps ** 0.5 * self._scale  # of the square root above
        return bool(self._reach.max() > last + max(tol * abs(last), rounding))

    def _residuals_of(self, columns: list[int]) -> Tensor:
        coordinates = self._coordinates[:, columns]
        mix = self._on_device(coordinates).T
        scaled = self._on_device(coordinates * self.values[columns]).T
        residuals: Tensor = torch.addmm(mix @ self._products[: self.size], scaled, self._basis[: self.size], alpha=-1)
        return residuals

    def _norms_of(self, rows: Tensor) -> Array:
        norms: Array = torch.linalg.vector_norm(rows, dim=1).to("cpu", torch.float64).numpy()
        return norms

    def _on_device(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._basis)

    def _grow(self) -> None:
        if self.size < len(self._basis):
            return
        extra = min(len(self._basis), self._capacity - self.size)
        self._basis = torch.cat([self._basis, torch.empty_like(self._basis[:extra])])
        self._products = torch.cat([self._products, torch.empty_like(self._products[:extra])])


def _orthogonal_part(direction: Tensor, basis: Tensor) -> Tensor | None:
    """The unit vector along the part of `direction` outside the span of the orthonormal rows; None without one."""
    unit: Tensor = direction / direction.norm()
    for _ in range(3):
        unit = unit - basis.T @ (basis @ unit)
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
