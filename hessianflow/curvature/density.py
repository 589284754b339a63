"""Spectral density by stochastic Lanczos quadrature (SLQ).

References: Golub and Welsch 1969; Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic
Lanczos quadrature, 2017; Ghorbani, Krishnan, Xiao, An investigation into neural net optimization
via Hessian eigenvalue density, 2019.

For a random unit vector v, `steps` Lanczos steps give a tridiagonal T with eigenpairs (theta_i,
s_i); nodes theta_i with weights (first entry of s_i)^2 are the Gauss quadrature of the spectral
measure of v, exact for polynomials up to degree 2 steps - 1. The average over probes estimates the
eigenvalue distribution, and their spread its error.

Deviations: full reorthogonalisation (without it, up to 28 of 150 nodes were copies of the top
eigenvalue); after a breakdown the quadrature is exact and the remaining nodes repeat the last one
with weight 0. Shares of the spectrum (negative, below a value) are not sums of weights but what the
rule bounds, see shares.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hessianflow.curvature.evidence import ROUNDING
from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import TraceResult
from hessianflow.curvature.shares import (
    Share,
    SignShares,
    limits_of,
    mass_limits,
    tridiagonal,
)
from hessianflow.curvature.vectors import estimating, gaussian, generator, norm
from hessianflow.interfaces import HessianFlowError, LinearOperator


@dataclass(frozen=True)
class SmoothedDensity:
    """Density of eigenvalues on a grid; it integrates to 1.

    Attributes:
        grid: eigenvalues, ascending, shape [points].
        density: mean over the probes, shape [points].
        spread: standard deviation over the probes, shape [points]; nan with a single probe.
        width: standard deviation of the Gaussian that each node was replaced by.
    """

    grid: Tensor
    density: Tensor
    spread: Tensor
    width: float


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature of the eigenvalue distribution for each probe.

    Attributes:
        nodes: eigenvalue estimates, ascending in each row, shape [num_probes, steps], float64 on
            the CPU.
        weights: their shares of the spectrum, rows summing to 1, shape [num_probes, steps].
        size: rows of the operator, so that size * weight counts eigenvalues.
        matvecs: products spent.
        recurrences: of each probe the diagonal and off-diagonal of its tridiagonal matrix, shape
            [2, steps] each; the last off-diagonal leads out of it, 0 after a breakdown. Without
            them nodes are taken for eigenvalues.
        noise: what the rounding of products may move an eigenvalue by.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    matvecs: int
    recurrences: tuple[Tensor, ...] = field(default=(), repr=False)
    noise: float = 0.0

    def smoothed(
        self,
        points: int = 1000,
        *,
        width: float | None = None,
        limits: tuple[float, float] | None = None,
    ) -> SmoothedDensity:
        """Replace each node by a Gaussian and average over probes, keeping the spread between them.

        Args:
            points: of the grid.
            width: standard deviation of the Gaussian; default 1 % of the range of nodes. Ours.
            limits: ends of the grid; default: all nodes and four widths on either side.

        Raises:
            HessianFlowError: fewer than 2 points, or a width that is not positive.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        scale = max(abs(low), abs(high)) or 1.0
        chosen = width if width is not None else 0.01 * max(high - low, 1e-3 * scale)
        if points < 2 or not chosen > 0:
            raise HessianFlowError(
                f"points must be at least 2 and width positive, got {points} and {width}"
            )
        first, last = limits or (low - 4 * chosen, high + 4 * chosen)
        grid = torch.linspace(first, last, points, dtype=torch.float64)
        kernels = torch.exp(-0.5 * ((grid - self.nodes[..., None]) / chosen) ** 2) / (
            chosen * (2 * torch.pi) ** 0.5
        )
        curves = (self.weights[..., None] * kernels).sum(dim=1)
        return SmoothedDensity(grid, curves.mean(dim=0), _spread(curves), chosen)

    def mass_below(self, value: float = 0.0) -> TraceResult:
        """Return the share of eigenvalues below `value`; two standard errors cover all that is left
        open.

        The value is the middle between the limits of the quadrature (shares.py). Where many
        eigenvalues lie at or near `value`, as with 0 in networks, they are far apart and the error
        is large: there :meth:`shares` says more.
        """
        limits = self._limits(value - self.noise, value + self.noise)
        least, most = limits.mean(dim=0).tolist()
        low, high = limits_of(least, most, self.size, len(limits))
        middle = (least + most) / 2
        stderr = max(middle - low, high - middle) / 2
        return TraceResult(middle, stderr, self.matvecs, tuple(limits.mean(dim=1).tolist()))

    def shares(self) -> SignShares:
        """Return shares of negative, zero and positive eigenvalues.

        What cannot be told from 0 is kept apart, not put on either side.
        """
        lower, upper = (self._limits(end, end).mean(dim=0) for end in (-self.noise, self.noise))
        probes = len(self.nodes)

        def share(value: Tensor, least: Tensor, most: Tensor) -> Share:
            low, high = limits_of(float(least), float(most), self.size, probes)
            return Share(min(max(float(value), low), high), low, high)

        undecided = upper[1] - lower[0]
        return SignShares(
            negative=share(lower[0], lower[0], lower[1]),
            zero=share(undecided, (upper[0] - lower[1]).clamp_min(0), undecided),
            positive=share(1 - upper[1], 1 - upper[1], 1 - upper[0]),
            zone=self._zone(),
        )

    def _limits(self, first: float, last: float) -> Tensor:
        """Return for each probe's measure the least below `first` and the most up to `last`,
        [num_probes, 2]."""
        if self.recurrences:
            pairs = [mass_limits(one, first, last) for one in self.recurrences]
            return torch.tensor(pairs, dtype=torch.float64)
        parts = (self.nodes < first, self.nodes <= last)
        return torch.stack([(self.weights * part).sum(dim=1) for part in parts], dim=1)

    def _zone(self) -> tuple[float, float]:
        """Return where the nodes begin on either side that are not 0, mean over probes."""
        ends = []
        for side in (-1, 1):
            away = side * self.nodes
            nearest = torch.where(away > self.noise, away, torch.inf).amin(dim=1)
            ends.append(side * float(torch.where(nearest.isinf(), self.noise, nearest).mean()))
        return ends[0], ends[1]

    def moment(self, power: int) -> float:
        """Return the mean of eigenvalue^power over the spectrum; times `size` it estimates tr
        A^power."""
        return float((self.weights * self.nodes**power).sum(dim=1).mean())


def spectral_density(
    operator: LinearOperator, *, num_probes: int, steps: int, seed: int | None = None
) -> SpectralDensity:
    """Return the distribution of all eigenvalues, from num_probes * steps products.

    Args:
        operator: any symmetric operator; with `params="layer1"` that of one layer.
        num_probes: random starts; two or more for error bars.
        steps: Lanczos steps for each, at most the size; memory is that of `steps` vectors.
        seed: None: fresh entropy.

    Raises:
        HessianFlowError: num_probes or steps below 1, or products that are not finite.
    """
    if num_probes < 1 or steps < 1:
        raise HessianFlowError(
            f"num_probes and steps must be at least 1, got {num_probes} and {steps}"
        )
    source = generator(seed, operator.device)
    with estimating(operator):
        rules = [
            _quadrature(operator, gaussian(operator, source), min(steps, operator.size))
            for _ in range(num_probes)
        ]
    longest = max(len(rule.nodes) for rule in rules)
    padded = [_padded(rule.nodes, rule.weights, longest) for rule in rules]
    nodes = torch.stack([nodes for nodes, _ in padded])
    return SpectralDensity(
        nodes=nodes,
        weights=torch.stack([weights for _, weights in padded]),
        size=operator.size,
        matvecs=sum(len(rule.nodes) for rule in rules),
        recurrences=tuple(rule.recurrence for rule in rules),
        noise=ROUNDING * torch.finfo(operator.dtype).eps * float(nodes.abs().max()),
    )


class _Rule(NamedTuple):
    """Nodes and weights of one probe, [steps] each, and their recurrence, [2, steps]."""

    nodes: Tensor
    weights: Tensor
    recurrence: Tensor


def _quadrature(operator: LinearOperator, start: Tensor, steps: int) -> _Rule:
    """Return the rule of one probe, by as many products as it has nodes."""
    basis = torch.empty(steps, operator.size, dtype=operator.dtype, device=operator.device)
    diagonal = torch.zeros(steps, dtype=torch.float64)
    beside = torch.zeros(steps, dtype=torch.float64)
    unit, taken = start / start.norm(), 0
    while taken < steps:
        basis[taken] = unit
        product = operator.matvec(unit)
        alpha = torch.dot(unit, product)
        known = basis[: taken + 1]
        for _ in range(2):
            product = product - known.T @ (known @ product)
        # One transfer per product: breakdown must be seen before the division.
        diagonal[taken], beside[taken] = torch.stack([alpha, norm(product)]).tolist()
        taken += 1
        if not bool(torch.isfinite(beside[taken - 1])):
            raise NonFiniteError(NON_FINITE_PRODUCT)
        scale = float(diagonal[:taken].abs().max() + beside[:taken].max())
        if float(beside[taken - 1]) <= 10 * torch.finfo(operator.dtype).eps * scale:
            beside[taken - 1] = 0.0
            break
        unit = product / beside[taken - 1].to(product)
    recurrence = torch.stack([diagonal[:taken], beside[:taken]])
    nodes, vectors = torch.linalg.eigh(tridiagonal(recurrence[0], recurrence[1, :-1]))
    return _Rule(nodes, vectors[0] ** 2, recurrence)


def _padded(nodes: Tensor, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    missing = length - len(nodes)
    return torch.cat([nodes, nodes[-1:].expand(missing)]), torch.cat(
        [weights, weights.new_zeros(missing)]
    )


def _spread(samples: Tensor) -> Tensor:
    return samples.std(dim=0) if len(samples) > 1 else torch.full_like(samples[0], float("nan"))
