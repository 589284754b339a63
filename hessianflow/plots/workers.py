"""A figure of the number of workers of an elastic run and of the throughput."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import Row, Run, RunSource, column, number, read_runs

# Events that get a mark: (marker, colour, legend text).
_MARKS = {
    "joined": ("^", style.COLOURS[2], "joined"),
    "left": ("v", style.COLOURS[4], "left"),
    "died": ("x", style.COLOURS[1], "died or hung"),
    "hung": ("x", style.COLOURS[1], "died or hung"),
    "requested": ("|", style.GREY, "asked for"),
    "refused": ("|", style.COLOURS[5], "refused"),
}


def has_workers(run: RunSource) -> bool:
    """Return whether a run was elastic."""
    return any("workers" in row for row in read_runs([run])[0].of_kind("event"))


def workers(
    run: RunSource,
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw workers, batch size and throughput of an elastic run over seconds, with its events.

    Args:
        run: run directory or object with `.records`.
        path: file for a PNG; None writes none.
        axes: Three axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: the run is not elastic.
    """
    [read] = read_runs([run])
    events = [
        row
        for row in read.of_kind("event")
        if number(row, "workers") >= 0 and number(row, "elapsed") >= 0
    ]
    if not events:
        raise HessianFlowError(
            f"{read.name} is no elastic run: none of its events holds a number of workers"
        )
    figure, (world, batch, rate) = style.canvas(axes, 9.0, 7.0, 3, 1, sharex=True)
    shown = _draw_world(world, events)
    _draw_measured(batch, rate, read)
    rate.set_xlim(left=0)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=text)
        for marker, colour, text in dict.fromkeys(_MARKS[kind] for kind in _MARKS if kind in shown)
    ]
    if handles:
        style.legend_below(figure, handles, axes)
    style.save(figure, path)
    return figure


def _draw_world(axes: Axes, events: Sequence[Row]) -> set[str]:
    """Draw workers as a staircase with marks, and return the kinds of events marked."""
    seconds = column(events, "elapsed")
    count = column(events, "workers")
    axes.step(seconds, count, where="post", color=style.colour(0), linewidth=1.6)
    shown = set()
    for row, x, y in zip(events, seconds, count, strict=True):
        if (kind := str(row.get("event"))) in _MARKS:
            marker, colour, _ = _MARKS[kind]
            axes.plot([x], [y], marker=marker, color=colour, markersize=7, linestyle="", zorder=4)
            shown.add(kind)
    axes.set_ylim(0, max(*count, 1) * 1.25)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.finish(axes, "", "workers")
    return shown


def _draw_measured(batch: Axes, rate: Axes, run: Run) -> None:
    rows = run.of_kind("throughput")
    seconds = column(rows, "elapsed")
    sizes = column(rows, "batch_size")
    # A row holds the values of the time up to it.
    x = np.append(seconds[:1] * 0, seconds)
    y = np.append(sizes[:1], sizes)
    batch.step(x, y, where="pre", color=style.colour(0), linewidth=1.6)
    style.finish(batch, "", "batch size (examples)")
    style.batch_axis(batch, sizes)
    speed = column(rows, "examples_per_second")
    rate.plot(seconds, speed, color=style.colour(0), marker=".", linewidth=1.0)
    style.finish(rate, "seconds", "examples a second")
    rate.set_ylim(bottom=0)
