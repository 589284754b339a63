"""A figure of the predicted time of a run on more and more workers."""

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import Array, column
from hessianflow.runs.text import in_figure

_SHOWN = ("step", "bandwidth", "latency", "batches")
"""Sources that are shown above the picture, because a prediction means little without them."""
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def scaling(
    plan: Mapping[str, Any],
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw the predicted time of a run, and the efficiency, over the number of workers.

    Args:
        plan: the content of plan.json.
        path: file for a PNG; None writes none.
        axes: Two axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: the plan holds no prediction.
    """
    rows = plan.get("predictions") or []
    if not rows:
        raise HessianFlowError("plan must hold at least one prediction, got none")
    workers = column(rows, "workers")
    seconds = column(rows, "seconds")
    figure, (time_axes, share_axes) = style.canvas(axes, 9.0, 4.2, 1, 2)
    _draw_time(time_axes, workers, seconds)
    lines = [
        in_figure(f"{name}: {text}")
        for name, text in (plan.get("sources") or {}).items()
        if name in _SHOWN
    ]
    title = "\n".join(fill(line, 150) for line in lines)
    if axes is None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=7, color=style.GREY)
    useful: dict[str, Any] = {"color": style.colour(0), "marker": "o", "markersize": 4}
    spent: dict[str, Any] = {"color": style.colour(1), "marker": "s", "markersize": 4}
    share_axes.plot(workers, 100 * column(rows, "efficiency"), **useful)
    share_axes.plot(workers, 100 * column(rows, "communication"), **spent)
    share_axes.set_ylim(0, 105)
    style.finish(share_axes, "workers", "share (%)")
    for panel in (time_axes, share_axes):
        _workers_axis(panel, workers)
    style.legend_below(
        figure,
        [
            Line2D([], [], label="predicted time; efficiency", **useful),
            Line2D([], [], color=style.GREY, linestyle="--", linewidth=1, label="perfect scaling"),
            Line2D([], [], label="time spent in all-reduces", **spent),
        ],
        axes,
    )
    style.save(figure, path)
    return figure


def _draw_time(axes: Axes, workers: Array, seconds: Array) -> None:
    unit, size = next(
        ((name, size) for name, size in _UNITS if seconds.max() >= 2 * size), _UNITS[-1]
    )
    times = seconds / size
    perfect = seconds[0] * workers[0] / workers / size
    axes.plot(workers, perfect, color=style.GREY, linestyle="--", linewidth=1)
    axes.plot(workers, times, color=style.colour(0), marker="o", markersize=4)
    style.finish(axes, "workers", f"time ({unit})")
    style.log_axis(axes, [*times, *perfect])


def _workers_axis(axes: Axes, workers: Array) -> None:
    axes.set_xscale("log", base=2)
    span = math.log2(workers.max() / workers.min())
    ticks = [float(workers.min())]
    for count in sorted(workers):
        if math.log2(count / ticks[-1]) >= max(span / 7, 1e-9):
            ticks.append(float(count))
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
