"""A figure of the usual curves of training: loss, accuracy, learning rate and batch size."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hessianflow.plots import style
from hessianflow.plots.records import Run, RunSource, batch_steps, column, read_runs

# A quantity that spans more than this factor is easier to read on a logarithmic axis.
_LOG_SPAN = 30.0


def training_curves(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw loss and accuracy over epochs and updates, learning rate and batch size over epochs.

    Args:
        runs: one or several run directories or objects with `.records`, drawn over each other.
        path: file for a PNG; None writes none.
        axes: Six axes to draw into; None for a new figure.
    """
    read = read_runs(runs)
    figure, drawn = style.canvas(axes, 9.0, 9.0, 3, 2)
    _draw_measure(drawn[0, 0], read, "epoch", "loss")
    _draw_measure(drawn[0, 1], read, "updates", "loss")
    _draw_measure(drawn[1, 0], read, "epoch", "accuracy")
    _draw_measure(drawn[1, 1], read, "updates", "accuracy")
    _draw_learning_rate(drawn[2, 0], read)
    _draw_batch_by_epoch(drawn[2, 1], read)
    kinds = [
        Line2D([], [], color=style.GREY, linestyle="-", label="evaluation"),
        Line2D([], [], color=style.GREY, linestyle="--", linewidth=1, label="training"),
    ]
    style.legend_below(figure, [*style.run_handles([run.name for run in read]), *kinds], axes)
    style.save(figure, path)
    return figure


def _draw_measure(axes: Axes, runs: Sequence[Run], x_key: str, measure: str) -> None:
    factor = 1
    label = "loss"
    if measure == "accuracy":
        factor = 100
        label = "accuracy (%)"
    values: list[float] = []
    for index, run in enumerate(runs):
        rows = run.of_kind("epoch")
        x = column(rows, x_key)
        for data, width, line in (("eval", 1.6, "-"), ("train", 1.0, "--")):
            y = column(rows, f"{data}_{measure}") * factor
            look = style.look(index, y)
            if len(rows) < 3:
                look["marker"] = look["marker"] or "."
            axes.plot(x, y, linewidth=width, linestyle=line, **look)
            values.extend(y[np.isfinite(y)])
    if measure == "loss" and values and min(values) > 0 and max(values) > _LOG_SPAN * min(values):
        style.log_axis(axes, values)
    if x_key == "epoch":
        style.finish(axes, "epochs", label)
        style.epochs_axis(axes)
    else:
        style.finish(axes, "optimizer updates", label)
        style.examples_axis(axes)


def _draw_learning_rate(axes: Axes, runs: Sequence[Run]) -> None:
    values: list[float] = []
    for index, run in enumerate(runs):
        rows = run.of_kind("epoch")
        # A row holds the rate at the end of its epoch, which is drawn over that whole epoch.
        rates = column(rows, "lr")
        y = np.append(rates[:1], rates)
        x = np.append(np.zeros(len(rows[:1])), column(rows, "epoch"))
        axes.step(x, y, where="pre", linewidth=1.4, **style.look(index, y))
        values.extend(y[np.isfinite(y) & (y > 0)])
    style.finish(axes, "epochs", "learning rate")
    style.epochs_axis(axes)
    if values and max(values) > _LOG_SPAN * min(values):
        style.log_axis(axes, values)


def _draw_batch_by_epoch(axes: Axes, runs: Sequence[Run]) -> None:
    sizes: list[float] = []
    for index, run in enumerate(runs):
        x, y = batch_steps(run)
        per_epoch = run.examples_per_epoch
        if math.isfinite(per_epoch):
            axes.step(x / per_epoch, y, where="post", linewidth=1.4, **style.look(index, y))
            sizes.extend(y[np.isfinite(y)])
    style.finish(axes, "epochs", "batch size (examples)")
    style.batch_axis(axes, sizes)
    style.epochs_axis(axes)
