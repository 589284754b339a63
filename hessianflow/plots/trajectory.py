"""A figure of top eigenvalue and batch size during a run, with the reason of every change."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hessianflow.interfaces import HESSIAN
from hessianflow.plots import style
from hessianflow.plots.events import Growth, growths, key, mark
from hessianflow.plots.records import Run, RunSource, batch_steps, column, read_runs
from hessianflow.runs.text import in_figure, plain

# The layout in inches is fixed, because the key below the axes has one line for each change.
_WIDTH = 9.0
_PLOT_HEIGHT = 3.9
_SIDE = 0.95
_TOP = 0.6
_BELOW_AXES = 0.62
_LINE = 0.19

_LONGEST_MODE = 40

# Kinds of marks: marker, legend text (none for the ordinary kind).
_MARKS = {
    "converged": ("o", ""),
    "unconverged": ("o", "not converged"),
    "negative": ("v", "negative: magnitude shown"),
    "missing": ("x", "zero or not finite"),
}


def curvature_trajectory(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw the top eigenvalue (logarithmic) and the batch size (second axis) over examples.

    Readings that did not converge are drawn hollow, negative ones as a triangle at their magnitude,
    and those that are zero or not finite as a cross at the lower edge. Every change of the batch
    size has a number, and its reason is given below. The matrix and the mode of batch normalisation
    are named at the axis, or beside each run if runs differ in them, so that their eigenvalues
    cannot be compared.

    Args:
        runs: one or several run directories or objects with `.records`, drawn over each other.
        path: file for a PNG; None writes none.
        ax: Axes to draw into, which get a twin for the batch size; None for a new figure.
    """
    read = read_runs(runs)
    every = (e for i, r in enumerate(read) for e in growths(r, style.colour(i)))
    events = sorted(every, key=lambda e: e.examples)
    marks = [_marks(run) for run in read]
    present = {name for of_run in marks for name, (x, _) in of_run.items() if len(x)}
    modes = [_norm_mode(run) for run in read]
    names = [run.name for run in read]
    matrices = [_matrix(run) for run in read]
    label = "top eigenvalue"
    if len(set(matrices)) == 1:
        label = f"top {in_figure(matrices[0])} eigenvalue"
    else:
        names = [f"{name} ({matrix})" for name, matrix in zip(names, matrices, strict=True)]
    if len(set(modes)) == 1:
        label += in_figure(modes[0])
    else:
        names = [name + mode for name, mode in zip(names, modes, strict=True)]
    handles = [*style.run_handles(names), *_mark_handles(present)]
    if ax is None:
        figure, axes = _layout(events, handles)
    else:
        figure, axes = _among_others(ax, events, handles)
    batch_axes = axes.twinx()
    for index, (run, of_run) in enumerate(zip(read, marks, strict=True)):
        _draw_eigenvalues(axes, run, of_run, index)
        examples, sizes = batch_steps(run)
        batch_axes.step(
            examples, sizes, where="post", lw=1.2, ls="--", alpha=0.6, **style.look(index, sizes)
        )
    style.batch_axis(batch_axes, [size for run in read for size in batch_steps(run)[1]])
    batch_axes.set_ylabel("batch size (examples)")
    batch_axes.spines["top"].set_visible(False)
    batch_axes.spines["right"].set_visible(True)
    style.finish(axes, "training examples", label)
    shown = [of_run[name] for of_run in marks for name in _MARKS if name != "missing"]
    style.log_axis(axes, [y for _, heights in shown for y in heights])
    style.examples_axis(axes)
    mark(axes, events, axes.get_window_extent().width * 72 / figure.dpi)
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


def _among_others(ax: Axes, events: Sequence[Growth], handles: list[Line2D]) -> tuple[Figure, Axes]:
    """Add the legend and the key to the user's axes, with the key below the label of the x axis."""
    figure, axes = style.canvas(ax, _WIDTH, _PLOT_HEIGHT)
    axes.legend(handles=handles, frameon=False, fontsize=8)
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 7}
    for number, (text, colour) in enumerate(key(events)):
        axes.text(0, -0.18 - 0.05 * number, text, color=colour, **place)
    return figure, axes


def _norm_mode(run: Run) -> str:
    """Return the modes of batch normalisation of the run's readings as the end of a label."""
    modes = dict.fromkeys(
        str(row["norm_mode"]) for row in run.of_kind("curvature") if "norm_mode" in row
    )
    if not modes:
        return ""
    return f" (norm mode: {style.cut(plain(', '.join(modes)), _LONGEST_MODE)})"


def _matrix(run: Run) -> str:
    """Return the name of the matrix, or the names, whose eigenvalues the run's readings are."""
    names = dict.fromkeys(str(row.get("matrix", HESSIAN)) for row in run.of_kind("curvature"))
    return style.cut(plain(", ".join(names) or HESSIAN), _LONGEST_MODE)


def _marks(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the positions (examples, height) of each kind of mark."""
    rows = run.of_kind("curvature")
    x = column(rows, "examples")
    y = column(rows, "eigenvalue")
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
    axes: Axes, run: Run, marks: dict[str, tuple[np.ndarray, np.ndarray]], index: int
) -> None:
    colour = style.colour(index)
    rows = run.of_kind("curvature")
    y = column(rows, "eigenvalue")
    # The line is broken where there is no value that a logarithmic axis can show.
    line = np.where(y > 0, y, np.nan)
    axes.plot(column(rows, "examples"), line, color=colour, linewidth=1.5, zorder=3)
    for name, (x, heights) in marks.items():
        look: dict[str, Any] = {"color": colour, "markersize": 4.5, "zorder": 4}
        marker = _MARKS[name][0]
        if marker == "o":  # an ordinary reading has the run's own marker
            marker = style.marker(index) or marker
        if name == "missing":
            look.update(markersize=5, transform=axes.get_xaxis_transform())
            heights = np.full(len(x), 0.02)
        elif name != "converged":
            look.update(markerfacecolor="white")
        axes.plot(x, heights, marker, **look)


def _mark_handles(present: set[str]) -> list[Line2D]:
    grey = style.GREY
    handles = [
        Line2D([], [], color=grey, linestyle="--", alpha=0.8, label="batch size (right axis)")
    ]
    for name, (marker, label) in _MARKS.items():
        if label and name in present:
            look: dict[str, Any] = {"marker": marker, "markerfacecolor": "white", "linestyle": ""}
            handles.append(Line2D([], [], color=grey, label=label, **look))
    return handles
