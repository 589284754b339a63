"""A figure of the spectral density of a Hessian, from stochastic Lanczos quadrature.

Each probe k gives nodes theta_kj and weights w_kj (summing to 1). They are broadened by Gaussians
of width sigma, phi_k(t) = sum_j w_kj N(t; theta_kj, sigma^2), and averaged over probes (Ghorbani,
Krishnan, Xiao, arXiv 1901.10159); the band is one standard error of that mean.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import Array

_POINTS = 2000
# Width of the Gaussians relative to the width of the spectrum. Our choice: narrow enough to
# separate outliers.
_RELATIVE_SIGMA = 0.01
# A single eigenvalue among millions is still visible; lower densities are not drawn.
_DECADES = 8.0


class Quadrature(Protocol):
    """Nodes and weights, shape [num_probes, steps] each; tensors or arrays."""

    @property
    def nodes(self) -> Any:
        """Return the Ritz values."""

    @property
    def weights(self) -> Any:
        """Return the weights of the nodes; each row sums to 1."""


def spectral_density(
    density: Quadrature | Mapping[str, Quadrature],
    path: str | Path | None = None,
    *,
    sigma: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the density of eigenvalues on a logarithmic axis, with its standard error as a band.

    Args:
        density: an object with `.nodes` and `.weights`, or several by name, drawn over each other.
        path: file for a PNG; None writes none.
        sigma: standard deviation of the Gaussians; None: 1 % of the width of the spectrum.
        ax: Axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: nodes and weights have different or wrong shapes, or are not finite; or
            sigma is not positive.
    """
    named = density
    if not isinstance(named, Mapping):
        named = {"": named}
    arrays = {name: _arrays(each) for name, each in named.items()}
    if not arrays:
        raise HessianFlowError("density must hold at least one spectrum, got none")
    low = min(float(nodes.min()) for nodes, _ in arrays.values())
    high = max(float(nodes.max()) for nodes, _ in arrays.values())
    width = _width(low, high, sigma)
    grid = np.linspace(low - 5 * width, high + 5 * width, _POINTS)
    figure, axes = style.canvas(ax, 9.0, 4.6)
    peak = 0.0
    for index, (nodes, weights) in enumerate(arrays.values()):
        mean, error = broaden(nodes, weights, grid, width)
        colour = style.colour(index)
        # Marks go only where the curve is above the lower end of the axis.
        visible = np.where(mean > mean.max() * 10**-_DECADES, mean, np.nan)
        axes.plot(grid, mean, linewidth=1.4, zorder=3, **style.look(index, visible))
        floor = np.maximum(mean - error, 1e-300)
        axes.fill_between(grid, floor, mean + error, alpha=0.25, linewidth=0, color=colour)
        peak = max(peak, float(mean.max()))
    axes.set_yscale("log")
    axes.set_ylim(peak * 10**-_DECADES, peak * 3)
    axes.set_xlim(grid[0], grid[-1])
    style.finish(axes, "eigenvalue", "density (per unit of eigenvalue)")
    if len(arrays) > 1:
        style.legend_below(figure, style.run_handles(list(arrays)), ax)
    probes = sorted({len(nodes) for nodes, _ in arrays.values()})
    axes.set_title(_title(probes, width), loc="left", fontsize=10)
    style.save(figure, path)
    return figure


def broaden(nodes: Array, weights: Array, grid: Array, sigma: float) -> tuple[Array, Array]:
    """Return the mean density on the grid and its standard error over probes, shape [points] each.

    The error of a single probe is given as zero.
    """
    each = np.stack([_smoothed(*probe, grid, sigma) for probe in zip(nodes, weights, strict=True)])
    error = np.zeros(len(grid))
    if len(each) > 1:
        error = each.std(0, ddof=1) / math.sqrt(len(each))
    return each.mean(0), error


def _smoothed(nodes: Array, weights: Array, grid: Array, sigma: float) -> Array:
    """Return the density of one probe on the grid."""
    z = (grid[:, None] - nodes[None, :]) / sigma
    smoothed: Array = (weights * np.exp(-0.5 * z**2)).sum(1) / (sigma * math.sqrt(2 * math.pi))
    return smoothed


def _arrays(density: Quadrature) -> tuple[Array, Array]:
    nodes = np.asarray(density.nodes, dtype=float)
    weights = np.asarray(density.weights, dtype=float)
    if nodes.ndim != 2 or nodes.shape != weights.shape or nodes.size == 0:
        raise HessianFlowError(
            f"nodes and weights must both have shape [num_probes, steps], got {nodes.shape} and"
            f" {weights.shape}"
        )
    if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
        raise HessianFlowError(
            "nodes and weights must be finite: the estimate broke down, take fewer steps"
        )
    return nodes, weights


def _width(low: float, high: float, sigma: float | None) -> float:
    if sigma is None:
        # A spectrum of a single point still needs a width.
        return _RELATIVE_SIGMA * ((high - low) or abs(high) or 1.0)
    if not 0 < sigma < math.inf:
        raise HessianFlowError(f"sigma must be positive and finite, got {sigma}")
    return sigma


def _title(probes: list[int], width: float) -> str:
    count = f"{probes[0]} to {probes[-1]} probes"
    if probes == [1]:
        count = "1 probe"
    elif len(probes) == 1:
        count = f"{probes[0]} probes"
    facts = [count, f"Gaussian width {width:.2g}"]
    if probes[-1] > 1:
        facts.append("band: standard error")
    return f"Spectral density ({', '.join(facts)})"
