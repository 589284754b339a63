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
  min(r, r^2/gap) <= tol |value| and r <= cap max|value|, cap = max(tol, min(0.01, sqrt(tol/10))). The bound r is a
  theorem; r^2/gap is its quadratic refinement (Temple, Kato); the cap keeps it from trusting a gap estimated too early
  (with 0.03 instead of 0.01, values 17 % low were accepted on a spectrum with three close outliers).
- Breakdown (a residual at rounding level): the space found is invariant. A fresh random direction orthogonal to it
  continues the search as long as pairs are missing.
"""

import torch
from torch import Tensor

from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.vectors import gaussian
from hessianflow.interfaces import LinearOperator

RESIDUAL_CAP = 0.01
"""Largest residual, relative to the largest value, for which the quadratic bound is trusted. Ours, measured."""

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
    seeds = list(start.unbind(1))
    while space.matvecs < max_matvecs:
        if seeds:
            extended = space.extend(seeds.pop(0))
        else:
            if space.is_full:
                space.compress(k + extra)
            extended = space.extend(space.direction(tol)) or space.extend(gaussian(operator, source))
        if extended:
            space.solve()
            history.append(float(space.values[0]))
        if not seeds and (space.size == operator.size or space.is_accurate(tol)):
            break
    return space.result(k + extra, tol, tuple(history))


class _RitzSpace:
    """The basis, its products, and the Ritz pairs of the operator on it."""

    def __init__(self, operator: LinearOperator, which: Which, k: int, capacity: int) -> None:
        self._operator, self._which, self._k, self._capacity = operator, which, k, capacity
        self._basis = torch.empty(min(8, capacity), operator.size, dtype=operator.dtype, device=operator.device)
        self._products = torch.empty_like(self._basis)
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64)
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
        # The one transfer to the host per product: m + 1 numbers, on which the stopping rule depends.
        column = (self._basis[: m + 1] @ product).to("cpu", torch.float64)
        if not bool(torch.isfinite(column).all()):
            raise NonFiniteError(NON_FINITE_PRODUCT)
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        return True

    def solve(self) -> None:
        """Ritz values in the wanted order, the vectors' coordinates, and residuals of the k wanted pairs."""
        theta, coordinates = torch.linalg.eigh(self._projected[: self.size, : self.size])
        order = _order(theta, self._which)
        self.values, self._coordinates = theta[order], coordinates[:, order]
        wanted = min(self._k, self.size)
        columns = [*range(wanted), *(j for j in _neighbours(self.values, wanted) if j >= wanted)]
        self._residual_vectors = self._residuals_of(columns)
        norms = self._residual_vectors.norm(dim=1).to("cpu", torch.float64)
        known = torch.full_like(self.values, float("inf"))
        known[columns] = norms
        self.residuals = norms[:wanted]
        self.bounds = _error_bounds(self.values, known, wanted)

    def is_accurate(self, tol: float) -> bool:
        """Whether all k wanted pairs are found and meet the tolerance."""
        return self.size >= self._k and bool(self._accurate(tol).all())

    def direction(self, tol: float) -> Tensor:
        """Where the space is wrong: the residual of the first wanted pair that is not accurate yet."""
        first = int(torch.argmin(self._accurate(tol).int()))  # the first False; 0 when only pairs are missing
        return self._residual_vectors[first]

    def compress(self, keep: int) -> None:
        """Thick restart: keep the best Ritz vectors and as many again, for the sake of convergence."""
        keep = min(self.size - 1, max(keep, self._capacity // 2))
        mix = self._coordinates[:, :keep].to(self._basis)
        self._basis[:keep] = mix.T @ self._basis[: self.size]
        self._products[:keep] = mix.T @ self._products[: self.size]
        self._projected.zero_()
        self._projected[:keep, :keep] = torch.diag(self.values[:keep])
        self.size = keep

    def result(self, count: int, tol: float, history: tuple[float, ...]) -> EigenResult:
        """The first `count` pairs; converged refers to the k wanted ones."""
        count = min(count, self.size)
        norms = self._residuals_of(list(range(count))).norm(dim=1).to("cpu", torch.float64)
        bounds = norms.clone()
        bounds[: len(self.bounds)] = self.bounds
        vectors = self._coordinates[:, :count].to(self._basis).T @ self._basis[: self.size]
        like = self._basis
        return EigenResult(
            values=self.values[:count].to(like),
            vectors=vectors.T,
            residuals=norms.to(like),
            error_bounds=bounds.to(like),
            matvecs=self.matvecs,
            converged=self.is_accurate(tol),
            history=history,
        )

    def _accurate(self, tol: float) -> Tensor:
        scale = float(self.values.abs().max())
        # Products carry rounding errors of this size; no residual can be asked to fall below.
        noise = 50 * torch.finfo(self._operator.dtype).eps * scale
        allowed = (tol * self.values[: len(self.bounds)].abs()).clamp(min=noise)
        cap = max(tol, min(RESIDUAL_CAP, (tol / 10) ** 0.5)) * scale
        accurate: Tensor = (self.bounds <= allowed) & (self.residuals <= max(cap, noise))
        return accurate

    def _residuals_of(self, columns: list[int]) -> Tensor:
        mix = self._coordinates[:, columns].to(self._basis)
        values = self.values[columns].to(self._basis)
        residuals: Tensor = mix.T @ self._products[: self.size] - (mix * values).T @ self._basis[: self.size]
        return residuals

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


def _order(theta: Tensor, which: Which) -> Tensor:
    """Indices from the most to the least wanted of ascending `theta`."""
    if which == "SA":
        return torch.arange(len(theta))
    descending = torch.arange(len(theta) - 1, -1, -1)
    if which == "LA":
        return descending
    # Of a tie (+3 and -3, up to rounding) the positive one comes first, so that the answer does not hang on the seed.
    magnitude = theta.abs() + (theta > 0) * (TIE * theta.abs().max())
    return torch.argsort(magnitude, descending=True)


def _neighbours(values: Tensor, wanted: int) -> list[int]:
    """Indices of the values next above and next below each of the first `wanted`."""
    by_value = torch.argsort(values).tolist()
    place = {index: position for position, index in enumerate(by_value)}
    found = {by_value[p] for i in range(wanted) for p in (place[i] - 1, place[i] + 1) if 0 <= p < len(by_value)}
    return sorted(found)


def _error_bounds(values: Tensor, residuals: Tensor, wanted: int) -> Tensor:
    """min(r, r^2/gap) of the first `wanted` values; residuals not computed are infinite and lie farther away."""
    distances = (values[:wanted, None] - values[None, :]).abs() - residuals[None, :]
    distances[torch.arange(wanted), torch.arange(wanted)] = float("inf")
    unknown = torch.isinf(residuals)[None, :].expand_as(distances)
    gap = distances.masked_fill(unknown, float("inf")).min(dim=1).values.clamp(min=0)
    r = residuals[:wanted]
    # One Ritz value alone has no neighbour to take a gap from: only the linear bound is known.
    gap = torch.where(torch.isinf(gap), torch.zeros_like(gap), gap)
    return torch.minimum(r, r * r / gap.clamp(min=torch.finfo(gap.dtype).tiny))
