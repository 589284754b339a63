"""Spectral density by stochastic Lanczos quadrature (SLQ).

References: Golub and Welsch 1969; Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic
Lanczos quadrature, 2017; Ghorbani, Krishnan, Xiao, An investigation into neural net optimization
via Hessian eigenvalue density, 2019.

For a random unit vector v, `steps` Lanczos steps give a tridiagonal T with eigenpairs (theta_i,
s_i); nodes theta_i with weights (first entry of s_i)^2 are the Gauss quadrature of the spectral
measure of v, exact for polynomials up to degree 2 steps - 1. The average over probes estimates the
distribution of eigenvalues, and the spread of the probes its error.

Deviations: the basis is fully reorthogonalised, because without that many nodes (28 of 150 on a
net) are copies of the top eigenvalue. After a breakdown the quadrature is exact, and further nodes
repeat the last one with weight 0. Shares of the spectrum are limits, not sums of weights
(shares.py).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hessianflow.curvature.evidence import ROUNDING
from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import TraceResult
from hessianflow.curvature.shares import Share, SignShares, limits_of, mass_limits, tridiagonal
from hessianflow.curvature.vectors import estimating, gaussian, generator, norm
from hessianflow.interfaces import HessianFlowError, LinearOperator


@dataclass(frozen=True)
class SmoothedDensity:
    """A density of eigenvalues on a grid, which integrates to 1.

    Attributes:
        grid: eigenvalues, ascending, shape [points].
        density: mean over the probes, shape [points].
        spread: standard deviation over the probes, shape [points]; nan with a single probe.
        width: standard deviation of the Gaussian that replaced each node.
    """

    grid: Tensor
    density: Tensor
    spread: Tensor
    width: float


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature of the eigenvalue distribution for each probe.

    Attributes:
        nodes: eigenvalue estimates, ascending in each row, [num_probes, steps], float64 on the CPU.
        weights: share of the spectrum that each node stands for, [num_probes, steps]; rows sum to
            1.
        size: rows of the operator, so that size * weight counts eigenvalues.
        matvecs: products spent.
        recurrences: diagonal and off-diagonal of each probe's tridiagonal matrix, shape [2, steps].
            The last off-diagonal entry leads out of the matrix; it is 0 after a breakdown. Where
            this is empty, nodes are taken for eigenvalues.
        noise: distance by which the rounding of products may move an eigenvalue.
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
            points: number of points of the grid, at least 2.
            width: standard deviation of the Gaussian. The default, 1 % of the range of nodes, is
                ours.
            limits: ends of the grid; default: all nodes and four widths on either side.

        Raises:
            HessianFlowError: there are fewer than 2 points, or the width is not positive.
        """
        if points < 2 or (width is not None and not width > 0):
            raise HessianFlowError(
                f"points must be at least 2 and width positive, got {points} and {width}"
            )
        low = float(self.nodes.min())
        high = float(self.nodes.max())
        if width is None:
            scale = max(abs(low), abs(high)) or 1.0
            width = 0.01 * max(high - low, 1e-3 * scale)
        first, last = limits or (low - 4 * width, high + 4 * width)
        grid = torch.linspace(first, last, points, dtype=torch.float64)
        kernels = torch.exp(-0.5 * ((grid - self.nodes[..., None]) / width) ** 2) / (
            width * (2 * torch.pi) ** 0.5
        )
        curves = (self.weights[..., None] * kernels).sum(dim=1)
        spread = torch.full_like(grid, torch.nan)
        if len(curves) > 1:
            spread = curves.std(dim=0)
        return SmoothedDensity(grid, curves.mean(dim=0), spread, width)

    def mass_below(self, value: float = 0.0) -> TraceResult:
        """Return the share of eigenvalues below `value`; two standard errors cover its limits.

        The estimate is the middle between the limits of the quadrature (shares.py). Where many
        eigenvalues lie at or near `value`, as at 0 in networks, the limits are far apart and the
        error is large: :meth:`shares` says more there.
        """
        limits = self._limits(value - self.noise, value + self.noise)
        least, most = limits.mean(dim=0).tolist()
        low, high = limits_of(least, most, self.size, len(limits))
        middle = (least + most) / 2
        stderr = max(middle - low, high - middle) / 2
        return TraceResult(middle, stderr, self.matvecs, tuple(limits.mean(dim=1).tolist()))

    def shares(self) -> SignShares:
        """Return the shares of negative, zero and positive eigenvalues.

        Eigenvalues that cannot be told from 0 are counted apart, on neither side.
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
        """Return each probe's least mass below `first` and most up to `last`, [num_probes, 2]."""
        if self.recurrences:
            pairs = [mass_limits(one, first, last) for one in self.recurrences]
            return torch.tensor(pairs, dtype=torch.float64)
        least = (self.weights * (self.nodes < first)).sum(dim=1)
        most = (self.weights * (self.nodes <= last)).sum(dim=1)
        return torch.stack([least, most], dim=1)

    def _zone(self) -> tuple[float, float]:
        """Return the first nodes on either side that are not 0, averaged over probes."""
        ends = []
        for side in (-1, 1):
            away = side * self.nodes
            nearest = torch.where(away > self.noise, away, torch.inf).amin(dim=1)
            ends.append(side * float(torch.where(nearest.isinf(), self.noise, nearest).mean()))
        return ends[0], ends[1]

    def moment(self, power: int) -> float:
        """Return the mean of eigenvalue^power; times `size` it estimates the trace of A^power."""
        return float((self.weights * self.nodes**power).sum(dim=1).mean())


def spectral_density(
    operator: LinearOperator, *, num_probes: int, steps: int, seed: int | None = None
) -> SpectralDensity:
    """Estimate the distribution of all eigenvalues from num_probes * steps products.

    Args:
        operator: any symmetric operator.
        num_probes: number of random starts; two or more give error bars.
        steps: Lanczos steps for each start, at most the size; as many vectors are held at a time.
        seed: seed of the starts; None draws fresh entropy.

    Raises:
        HessianFlowError: num_probes or steps is below 1, or a product is not finite.
    """
    if num_probes < 1 or steps < 1:
        raise HessianFlowError(
            f"num_probes and steps must be at least 1, got {num_probes} and {steps}"
        )
    source = generator(seed, operator.device)
    with estimating(operator):
        starts = (gaussian(operator, source) for _ in range(num_probes))
        rules = [_quadrature(operator, start, min(steps, operator.size)) for start in starts]
    longest = max(len(rule.nodes) for rule in rules)
    nodes = torch.stack([_padded(rule.nodes, longest, rule.nodes[-1]) for rule in rules])
    return SpectralDensity(
        nodes=nodes,
        weights=torch.stack([_padded(rule.weights, longest, 0.0) for rule in rules]),
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
    """Return the rule of one probe; each of its nodes costs one product."""
    basis = torch.empty(steps, operator.size, dtype=operator.dtype, device=operator.device)
    diagonal = torch.zeros(steps, dtype=torch.float64)
    beside = torch.zeros(steps, dtype=torch.float64)
    unit = start / start.norm()
    taken = 0
    while taken < steps:
        basis[taken] = unit
        product = operator.matvec(unit)
        alpha = torch.dot(unit, product)
        known = basis[: taken + 1]
        for _ in range(2):
            product = product - known.T @ (known @ product)
        # The host waits here, once a product: a breakdown must be seen before the division.
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


def _padded(row: Tensor, length: int, value: Tensor | float) -> Tensor:
    return nn.functional.pad(row, (0, length - len(row)), value=float(value))
