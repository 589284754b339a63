"""A figure of the loss that branches of a run reach, over their batch size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style

MOST = 100.0
"""Largest excess that is drawn, in percent: a loss as far above as it was at the start."""


def critical_batch(
    sizes: Sequence[Mapping[str, Any]],
    tolerance: float,
    critical: int,
    path: str | Path | None = None,
    title: str = "Branches at several batch sizes",
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw the excess of losses over the batch size, with the tolerance and the critical batch.

    Args:
        sizes: for each batch size a mapping with "batch_size", "excess" (of its loss over that of
            the smallest, as a share; None or infinite where the branches diverged) and "stderr" of
            that excess.
        tolerance: the excess that is tolerated.
        critical: the critical batch size.
        path: file for a PNG; None writes none.
        title: title of the figure.
        ax: Axes to draw into; None for a new figure.

    Returns:
        The figure, not bound to pyplot.

    Raises:
        HessianFlowError: there are no sizes.
    """
    if not sizes:
        raise HessianFlowError("sizes must hold at least one batch size")
    figure, axes = style.canvas(ax, 6.5, 4.2)
    batch = np.array([row["batch_size"] for row in sizes], dtype=float)
    axes.axhspan(-1e6, 100 * tolerance, color=style.GREY, alpha=0.12, linewidth=0)
    low, high = _draw(axes, batch, sizes, tolerance)
    axes.axvline(
        critical, color=style.colour(2), linestyle="--", label=f"critical batch: {critical}"
    )
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch, [f"{size:.0f}" for size in batch])
    axes.minorticks_off()
    style.finish(axes, "batch size", "excess loss (% of the loss at the start)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    style.save(figure, path)
    return figure


def _draw(
    axes: Axes, batch: np.ndarray, sizes: Sequence[Mapping[str, Any]], tolerance: float
) -> tuple[float, float]:
    """Draw the branches, and return the ends of what is drawn."""
    excess = 100 * np.array([row["excess"] for row in sizes], dtype=float)  # None becomes nan
    error = 200 * np.array([row["stderr"] for row in sizes], dtype=float)
    inside = excess <= MOST  # nan is not
    axes.errorbar(
        batch[inside],
        excess[inside],
        yerr=error[inside],
        marker="o",
        capsize=3,
        color=style.colour(0),
        label="branches (bar: 2 standard errors)",
    )
    low = min([-100 * tolerance, *(excess - error)[inside]])
    high = max([300 * tolerance + 1, *(excess + error)[inside]])
    if not inside.all():
        beyond = batch[~inside]
        top = np.full(len(beyond), high)
        axes.plot(beyond, top, "x", color=style.colour(1), label="far more, or diverged")
    return low, high
