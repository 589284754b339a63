"""A figure of how near the steps of an optimizer are to the edge of stability during a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import Run, RunSource, column, read_runs


def has_edge_share(runs: Iterable[RunSource]) -> bool:
    """Return whether a reading of one of the runs holds a share that can be drawn."""
    return any(len(_readings(run)[0]) for run in read_runs(runs))


def edge_share(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw the share of the stable threshold in use (logarithmic) over epochs.

    The share is rate * sharpness / threshold in the optimizer's own geometry, see
    :func:`hessianflow.curvature.optimizer_geometry`. Above 1, where a line is drawn, steps along
    the leading eigenvector grow on a quadratic. Readings whose share is not positive (the loss
    falls all along the update, or the curvature is negative) are left out.

    Args:
        runs: one or several run directories or objects with `.records`, drawn over each other.
        path: file for a PNG; None writes none.
        ax: Axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: no reading of any run holds a positive share.
    """
    read = read_runs(runs)
    drawn = [_readings(run) for run in read]
    if not any(len(shares) for _, shares in drawn):
        names = ", ".join(run.name for run in read)
        raise HessianFlowError(
            f"no reading of {names} holds a share of the edge: train with a probe that knows the"
            " optimizer, as `hessianflow train --curvature epoch` does"
        )
    figure, axes = style.canvas(ax, 9.0, 4.5)
    for index, (epochs, shares) in enumerate(drawn):
        axes.plot(epochs, shares, linewidth=1.4, **style.look(index, shares))
    axes.axhline(1.0, color=style.GREY, linewidth=1, linestyle="--")
    style.finish(axes, "epochs", "share of the edge of stability in use")
    style.log_axis(axes, [1.0, *np.concatenate([shares for _, shares in drawn])])
    style.epochs_axis(axes)
    edge = Line2D([], [], color=style.GREY, linestyle="--", linewidth=1, label="edge")
    style.legend_below(figure, [*style.run_handles(_labels(read)), edge], ax)
    style.save(figure, path)
    return figure


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run with its optimizer, which decides where the edge is."""
    optimizers = [run.config.get("trainer", {}).get("optimizer", "") for run in runs]
    return [
        f"{run.name} ({optimizer})".removesuffix(" ()")
        for run, optimizer in zip(runs, optimizers, strict=True)
    ]


def _readings(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs done at each reading with a positive share, and the shares."""
    rows = run.of_kind("curvature")
    shares = column(rows, "edge_share")
    epochs = column(rows, "examples") / run.examples_per_epoch
    shown = np.isfinite(epochs) & np.isfinite(shares) & (shares > 0)
    return epochs[shown], shares[shown]
