"""The curvature trajectory: top eigenvalue and batch size over the course of a run, with the reason
of every change."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hessianflow.plots import style
from hessianflow.plots.events import Growth, growths, key, mark
from hessianflow.plots.records import Run, RunSource, batch_steps, column, read_runs
from hessianflow.runs.text import in_figure, plain

# Layout in inches: fixed, because the key below the axes has as many lines as there were changes.
_WIDTH, _PLOT_HEIGHT, _SIDE, _TOP, _BELOW_AXES, _LINE = 9.0, 3.9, 0.95, 0.6, 0.62, 0.19

_LONGEST_MODE = 40

# What the marks mean: marker, legend text (none for the ordinary case).
_MARKS = {
    "converged": ("o", ""),
    "unconverged": ("o", "not converged"),
    "negative": ("v", "negative: magnitude shown"),
    "missing": ("x", "zero or not finite"),
}


def curvature_trajectory(
    runs: RunSource | Iterable[RunSource], path: str | Path | None = None
) -> Figure:
    """Top eigenvalue (logarithmic) and batch size (second axis, steps) over training examples.

    Readings that did not converge are drawn hollow; negative ones as a triangle at their magnitude;
    those that are zero or not finite as a cross at the lower edge. Every change of the batch size
    is marked by a number whose reason stands below. How batch normalisation was treated stands at
    the axis, or beside each run where runs differ in it: their eigenvalues cannot be compared then.

    Args:
        runs: one or several run directories or objects with `.records`, drawn over each other.
        path: where to write a PNG; None: nowhere.

    Returns:
        The figure, not bound to pyplot.

    Raises:
        HessianFlowError: no run, a folder that is not a run directory, a damaged history, an
            unwritable path.
    """
    read = read_runs(runs)
    events = sorted(
        (e for i, r in enumerate(read) for e in growths(r, style.colour(i))),
        key=lambda e: e.examples,
    )
    marks = [_marks(run) for run in read]
    present = {name for found in marks for name, (x, _) in found.items() if len(x)}
    modes = [_norm_mode(run) for run in read]
    shared = len(set(modes)) == 1
    names = [run.name if shared else run.name + mode for run, mode in zip(read, modes, strict=True)]
    handles = [*style.run_handles(names), *_mark_handles(present)]
    figure, axes = _layout(events, handles)
    batch_axes = axes.twinx()
    for index, (run, found) in enumerate(zip(read, marks, strict=True)):
        _draw_eigenvalues(axes, run, found, index)
        examples, sizes = batch_steps(run)
        batch_axes.step(
            examples, sizes, where="post", lw=1.2, ls="--", alpha=0.6, **style.look(index, sizes)
        )
    style.batch_axis(batch_axes, [size for run in read for size in batch_steps(run)[1]])
    batch_axes.set_ylabel("batch size (examples)")
    batch_axes.spines["top"].set_visible(False)
    batch_axes.spines["right"].set_visible(True)
    style.finish(
        axes,
        "training examples",
        "top Hessian eigenvalue" + (in_figure(modes[0]) if shared else ""),
    )
    style.log_axis(
        axes, [y for found in marks for name in _MARKS if name != "missing" for y in found[name][1]]
    )
    style.examples_axis(axes)
    mark(axes, events, (_WIDTH - 2 * _SIDE) * 72)
    style.save(figure, path)
    return figure


def _layout(events: Sequence[Growth], handles: list[Line2D]) -> tuple[Figure, Axes]:
    lines = key(events)
    columns = style.legend_columns(handles)
    legend = 0.25 * -(-len(handles) // columns) + 0.15
    below = _BELOW_AXES + _LINE * len(lines) + legend
    height = _TOP + _PLOT_HEIGHT + below
    figure = style.new_figure(_WIDTH, height, layout=None)
    axes = figure.add_axes(
        (_SIDE / _WIDTH, below / height, 1 - 2 * _SIDE / _WIDTH, _PLOT_HEIGHT / height)
    )
    for i, (text, colour) in enumerate(lines):
        y = (below - _BELOW_AXES - _LINE * i) / height
        figure.text(_SIDE / _WIDTH, y, text, color=colour, fontsize=8, va="top")
    figure.text(_SIDE / _WIDTH, 1 - 0.1 / height, "Curvature and batch size", fontsize=11, va="top")
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    return figure, axes


def _norm_mode(run: Run) -> str:
    """Return the batch normalisation of the run's readings, as an addition to a label; empty where
    they do not say."""
    found = dict.fromkeys(
        str(row["norm_mode"]) for row in run.of_kind("curvature") if "norm_mode" in row
    )
    return f" (norm mode: {style.cut(plain(', '.join(found)), _LONGEST_MODE)})" if found else ""


def _marks(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return where each kind of mark goes: (examples, height)."""
    rows = run.of_kind("curvature")
    x, y = column(rows, "examples"), column(rows, "eigenvalue")
    settled = np.array([bool(row.get("converged", True)) for row in rows], dtype=bool)
    finite = np.isfinite(y)
    chosen = {
        "converged": finite & (y > 0) & settled,
        "unconverged": finite & (y > 0) & ~settled,
        "negative": finite & (y < 0),
        "missing": ~finite | (y == 0),
    }
    return {name: (x[where], np.abs(y[where])) for name, where in chosen.items()}


def _draw_eigenvalues(
    axes: Axes, run: Run, found: dict[str, tuple[np.ndarray, np.ndarray]], index: int
) -> None:
    colour = style.colour(index)
    rows = run.of_kind("curvature")
    y = column(rows, "eigenvalue")
    # The line is broken where there is no value that a logarithmic axis can show.
    line = np.where(y > 0, y, np.nan)
    axes.plot(column(rows, "examples"), line, color=colour, linewidth=1.5, zorder=3)
    for name, (x, heights) in found.items():
        face = colour if name == "converged" else "white"
        marker = _MARKS[name][0]
        if marker == "o":  # a reading like any other: the marker is the run's own
            marker = style.marker(index) or marker
        if name == "missing":
            edge = axes.get_xaxis_transform()
            axes.plot(
                x,
                np.full(len(x), 0.02),
                marker,
                color=colour,
                markersize=5,
                zorder=4,
                transform=edge,
            )
        else:
            axes.plot(
                x, heights, marker, color=colour, markerfacecolor=face, markersize=4.5, zorder=4
            )


def _mark_handles(present: set[str]) -> list[Line2D]:
    grey = style.GREY
    handles = [
        Line2D([], [], color=grey, linestyle="--", alpha=0.8, label="batch size (right axis)")
    ]
    for name, (marker, label) in _MARKS.items():
        if label and name in present:
            look = Line2D(
                [],
                [],
                color=grey,
                marker=marker,
                markerfacecolor="white",
                linestyle="",
                label=label,
            )
            handles.append(look)
    return handles
