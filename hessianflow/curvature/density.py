"""Spectral density by stochastic Lanczos quadrature (SLQ).

References: Golub and Welsch 1969; Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
2017; Ghorbani, Krishnan, Xiao, An investigation into neural net optimization via Hessian eigenvalue density, 2019.

For a random unit vector v, `steps` Lanczos steps give a tridiagonal T with eigenpairs (theta_i, s_i); nodes theta_i
with weights (first entry of s_i)^2 are the Gauss quadrature of the spectral measure of v, exact for polynomials up to
degree 2 steps - 1. The average over probes estimates the eigenvalue distribution, and their spread its error.

Deviations: full reorthogonalisation (without it, up to 28 of 150 nodes were copies of the top eigenvalue); after a
breakdown the quadrature is exact and the remaining nodes repeat the last one with weight 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import TraceResult
from hessianflow.curvature.vectors import gaussian, generator, norm
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
        nodes: eigenvalue estimates, ascending in each row, shape [num_probes, steps], float64 on the CPU.
        weights: their shares of the spectrum, rows summing to 1, shape [num_probes, steps].
        size: rows of the operator, so that size * weight counts eigenvalues.
        matvecs: products spent.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    matvecs: int

    def smoothed(
        self, points: int = 1000, *, width: float | None = None, limits: tuple[float, float] | None = None
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
            raise HessianFlowError(f"points must be at least 2 and width positive, got {points} and {width}")
        first, last = limits or (low - 4 * chosen, high + 4 * chosen)
        grid = torch.linspace(first, last, points, dtype=torch.float64)
        kernels = torch.exp(-0.5 * ((grid - self.nodes[..., None]) / chosen) ** 2) / (chosen * (2 * torch.pi) ** 0.5)
        curves = (self.weights[..., None] * kernels).sum(dim=1)
        return SmoothedDensity(grid, curves.mean(dim=0), _spread(curves), chosen)

    def mass_below(self, value: float = 0.0) -> TraceResult:
        """Share of eigenvalues below `value` (0: the negative mass), with its standard error over probes."""
        shares = (self.weights * (self.nodes < value)).sum(dim=1)
        stderr = float(_spread(shares) / len(shares) ** 0.5) if len(shares) > 1 else float("inf")
        return TraceResult(float(shares.mean()), stderr, self.matvecs, tuple(shares.tolist()))

    def moment(self, power: int) -> float:
        """Mean of eigenvalue^power over the spectrum; times `size` it estimates tr A^power."""
        return float((self.weights * self.nodes**power).sum(dim=1).mean())


def spectral_density(
    operator: LinearOperator, *, num_probes: int, steps: int, seed: int | None = None
) -> SpectralDensity:
    """The distribution of all eigenvalues, from num_probes * steps products.

    Args:
        operator: any symmetric operator; with `params="layer1"` that of one layer.
        num_probes: random starts; two or more for error bars.
        steps: Lanczos steps for each, at most the size; memory is that of `steps` vectors.
        seed: None: fresh entropy.

    Raises:
        HessianFlowError: num_probes or steps below 1, or products that are not finite.
    """
    if num_probes < 1 or steps < 1:
        raise HessianFlowError(f"num_probes and steps must be at least 1, got {num_probes} and {steps}")
    source = generator(seed, operator.device)
    with torch.no_grad():
        rules = [
            _quadrature(operator, gaussian(operator, source), min(steps, operator.size)) for _ in range(num_probes)
        ]
    longest = max(len(nodes) for nodes, _, _ in rules)
    padded = [_padded(nodes, weights, longest) for nodes, weights, _ in rules]
    return SpectralDensity(
        nodes=torch.stack([nodes for nodes, _ in padded]),
        weights=torch.stack([weights for _, weights in padded]),
        size=operator.size,
        matvecs=sum(spent for _, _, spent in rules),
    )


def _quadrature(operator: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """Nodes, weights and products spent of one probe."""
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
            break
        unit = product / beside[taken - 1].to(product)
    off = beside[: taken - 1]
    tridiagonal = torch.diag(diagonal[:taken]) + torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes, vectors[0] ** 2, taken


def _padded(nodes: Tensor, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    missing = length - len(nodes)
    return torch.cat([nodes, nodes[-1:].expand(missing)]), torch.cat([weights, weights.new_zeros(missing)])


def _spread(samples: Tensor) -> Tensor:
    return samples.std(dim=0) if len(samples) > 1 else torch.full_like(samples[0], float("nan"))
