"""A figure of the loss along directions through the trained weights (Li et al., 1712.09913)."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import Array
from hessianflow.runs.text import in_figure

# Losses that span more than this factor get a logarithmic scale.
_LOG_SPAN = 30.0


def landscape(
    alphas: Any,
    losses: Any,
    betas: Any = None,
    path: str | Path | None = None,
    *,
    title: str = "Loss landscape",
    ax: Axes | None = None,
) -> Figure:
    """Draw a curve (one direction) or contours (two directions) of the loss.

    The trained weights are at the origin. Points where the loss is not finite are left blank.

    Args:
        alphas: steps along the first direction, shape [n].
        losses: losses at these steps, shape [n], or [n, m] with `betas`.
        betas: steps along the second direction, shape [m]; None: one direction.
        path: file for a PNG; None writes none.
        title: title above the axes.
        ax: Axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: the shapes do not fit, a direction has fewer than two points, or no loss
            is finite.
    """
    a = np.asarray(alphas, dtype=float)
    z = np.asarray(losses, dtype=float)
    expected: tuple[int, ...] = (len(a),)
    height = 4.2
    if betas is not None:
        b = np.asarray(betas, dtype=float)
        expected = (len(a), len(b))
        height = 5.2
    if z.shape != expected or min(expected) < 2:
        raise HessianFlowError(
            f"losses must have shape {expected} with at least 2 points a side, got {z.shape}"
        )
    if not np.isfinite(z).any():
        raise HessianFlowError("losses must hold at least one finite value: take smaller steps")
    figure, axes = style.canvas(ax, 6.5, height)
    if betas is None:
        _curve(axes, a, z)
    else:
        _contours(figure, axes, a, b, z)
    axes.set_title(in_figure(title), loc="left", fontsize=11)
    style.save(figure, path)
    return figure


def _curve(axes: Axes, alphas: Array, losses: Array) -> None:
    axes.plot(
        alphas, np.where(np.isfinite(losses), losses, np.nan), color=style.colour(0), linewidth=1.6
    )
    axes.axvline(0.0, color=style.GREY, linewidth=0.9, linestyle=":")
    style.finish(axes, "step along the direction", "loss")
    if _spans_decades(losses):
        style.log_axis(axes, losses)


def _contours(figure: Figure, axes: Axes, alphas: Array, betas: Array, losses: Array) -> None:
    shown = np.ma.masked_invalid(losses.T)
    if _spans_decades(losses):
        levels = np.geomspace(shown.min(), shown.max(), 25)
        filled = axes.contourf(alphas, betas, shown, levels=levels, cmap="viridis", norm="log")
        bar = figure.colorbar(filled, ax=axes, label="loss", format="%.3g")
        bar.locator = LogLocator(subs=(1.0, 2.0, 5.0))
        bar.update_ticks()
    else:
        filled = axes.contourf(alphas, betas, shown, levels=25, cmap="viridis")
        figure.colorbar(filled, ax=axes, label="loss", format="%.3g")
    axes.contour(
        filled, levels=np.asarray(filled.levels)[::3], colors="white", linewidths=0.5, alpha=0.7
    )
    axes.plot([0.0], [0.0], marker="*", markersize=11, color="white", markeredgecolor="black")
    axes.set_xlabel("step along direction 1")
    axes.set_ylabel("step along direction 2")


def _spans_decades(losses: Array) -> bool:
    finite = losses[np.isfinite(losses)]
    return bool(finite.min() > 0 and finite.max() > _LOG_SPAN * finite.min())
