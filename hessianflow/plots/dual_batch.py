"""Figures of runs on a parameter server and of runs that change the resolution."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hessianflow.checks import check_count
from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.plots.records import (
    Array,
    Row,
    Run,
    RunSource,
    batch_steps,
    column,
    number,
    read_runs,
)

SMALL = style.COLOURS[1]
LARGE = style.COLOURS[0]
WAITING = "#dddddd"

SHOWN_EPOCHS = 6
"""Epochs of the timeline: more bars than these cannot be told apart."""
SHOWN_WORKERS = 50
"""Workers of the timeline: a picture of more is taller than any screen."""


def accuracy_over_time(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw evaluation accuracy over the server's clock (predicted in a simulation) and wall time.

    Args:
        runs: one or several runs; those without a server are drawn in the second panel only.
        path: file for a PNG; None writes none.
        axes: Two axes to draw into; None for a new figure.
    """
    read = read_runs(runs)
    figure, (left, right) = style.canvas(axes, 9.0, 3.8, 1, 2, sharey=True)
    for index, run in enumerate(read):
        rows = run.of_kind("epoch")
        accuracy = 100 * column(rows, "eval_accuracy")
        look: dict[str, Any] = {"color": style.colour(index), "linewidth": 1.4}
        look["marker"] = style.marker(index) or "."
        left.plot(column(rows, "clock_seconds"), accuracy, **look)
        right.plot(np.cumsum(column(rows, "seconds")), accuracy, **look)
    style.finish(left, "seconds on the server's clock (simulated: predicted)", "test accuracy (%)")
    style.finish(right, "seconds of this machine", "")
    for panel in (left, right):
        panel.set_xlim(left=0)
    style.legend_below(figure, style.run_handles([run.name for run in read]), axes)
    style.save(figure, path)
    return figure


def commit_timeline(
    run: RunSource,
    path: str | Path | None = None,
    *,
    epochs: int = SHOWN_EPOCHS,
    ax: Axes | None = None,
) -> Figure:
    """Draw every local epoch as a bar from pull to push, in one line for each worker.

    Grey bars show where a worker waited for others.

    Args:
        run: a run on a parameter server.
        path: file for a PNG; None writes none.
        epochs: number of epochs to show, from the first.
        ax: Axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: the run has no commit.
    """
    check_count("epochs", epochs)
    [read] = read_runs([run])
    commits = _last_of_each(read.of_kind("commit"))
    if not commits:
        raise HessianFlowError(f"{read.name} holds no commit: it had no parameter server")
    every = sorted({int(number(row, "worker")) for row in commits})
    workers = every[:SHOWN_WORKERS]
    shown = [row for row in commits[: epochs * len(every)] if int(number(row, "worker")) in workers]
    figure, axes = style.canvas(ax, 9.0, 1.6 + 0.45 * len(workers))
    _draw_bars(axes, shown, _small_workers(read))
    style.finish(axes, "seconds on the server's clock", "worker")
    axes.set_yticks(workers)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    total = math.ceil(len(commits) / len(every))
    title = f"first {min(epochs, total)} of {total} epochs; a bar ends with a push"
    if len(every) > len(workers):
        title += f"; {len(every) - len(workers)} further workers left out"
    axes.set_title(title, fontsize=9, loc="left")
    looks = (("small batch", SMALL), ("large batch", LARGE), ("waiting for others", WAITING))
    handles = [Patch(color=colour, label=name) for name, colour in looks]
    style.legend_below(figure, handles, ax)
    style.save(figure, path)
    return figure


def _draw_bars(axes: Axes, commits: Sequence[Row], small: set[int]) -> None:
    free: dict[int, float] = {}
    for row in commits:
        worker = int(number(row, "worker"))
        began = number(row, "started")
        ended = number(row, "finished")
        waited = free.get(worker, 0.0)
        if began > waited:
            axes.barh(worker, began - waited, left=waited, height=0.6, color=WAITING)
        colour = LARGE
        if worker in small:
            colour = SMALL
        axes.barh(worker, ended - began, left=began, height=0.6, color=colour, edgecolor="white")
        free[worker] = ended


def batch_and_resolution(
    run: RunSource,
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw batch sizes (of both kinds of workers if there are two) and resolution over epochs.

    Args:
        run: a run on a parameter server or with a schedule of resolutions.
        path: file for a PNG; None writes none.
        axes: Two axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: the run records no resolution.
    """
    [read] = read_runs([run])
    rows = read.of_kind("epoch")
    edges, sides = _resolutions(read, rows)
    figure, (top, bottom) = style.canvas(axes, 9.0, 4.6, 2, 1, sharex=True)
    _draw_batches(top, read, rows)
    bottom.step(edges, sides, where="post", color=style.COLOURS[2], linewidth=1.6)
    style.finish(bottom, "epochs", "resolution (pixels)")
    bottom.set_yticks(sorted(set(sides)))
    bottom.set_ylim(min(sides) * 0.9, max(sides) * 1.05)
    style.epochs_axis(bottom)
    style.save(figure, path)
    return figure


def _draw_batches(axes: Axes, run: Run, rows: Sequence[Row]) -> None:
    small = column(rows, "small_batch_size")
    if np.isfinite(small).any():
        epochs = np.append(0, column(rows, "epoch"))
        large = column(rows, "batch_size")
        lines = [("large batch", large, LARGE), ("small batch", small, SMALL)]
    else:
        examples, sizes = batch_steps(run)
        epochs = examples / run.examples_per_epoch
        lines = [("batch", sizes[:-1], LARGE)]
    for _, values, colour in lines:
        axes.step(epochs, np.append(values, values[-1]), where="post", color=colour, linewidth=1.6)
    style.finish(axes, "", "batch size (examples)")
    style.batch_axis(
        axes, [value for _, values, _ in lines for value in values if math.isfinite(value)]
    )
    handles = [Line2D([], [], color=colour, label=name) for name, _, colour in lines]
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(lines)}
    axes.legend(handles=handles, fontsize=8, frameon=False, **place)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _resolutions(run: Run, rows: Sequence[Row]) -> tuple[Array, list[float]]:
    """Return the epochs at which the resolution was set, with the end, and it from there on."""
    stages = run.config.get("resolution_stages") or []
    if stages:
        done = max((number(row, "epoch") for row in rows), default=0.0)
        kept = [stage for stage in stages if stage["start"] < done]
        sides = [float(stage["level"]["resolution"]) for stage in kept]
        return np.array([*(float(stage["start"]) for stage in kept), done]), [*sides, sides[-1]]
    sides = [value for value in column(rows, "resolution") if math.isfinite(value)]
    if not sides:
        raise HessianFlowError(f"{run.name} records no resolution: it kept that of its data")
    return np.append(0, column(rows, "epoch")), [*sides, sides[-1]]


def _last_of_each(commits: Sequence[Row]) -> list[Row]:
    """Return the commits in order; of those repeated after a server's death only the last."""
    return list({number(row, "commits"): row for row in commits}.values())


def _small_workers(run: Run) -> set[int]:
    plans = run.config.get("dual_batch", {}).get("plans", {}).values()
    return {i for plan in plans for i, worker in enumerate(plan["workers"]) if worker["small"]}
