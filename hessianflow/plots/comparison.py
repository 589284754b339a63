"""A comparison of groups of runs by accuracy, updates and time: a table and a figure."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hessianflow.plots import style
from hessianflow.plots.grouping import Group, group_runs, seed_of
from hessianflow.plots.records import (
    Run,
    RunSource,
    batch_steps,
    column,
    distinct,
    number,
    read_runs,
)
from hessianflow.runs.text import in_csv, in_markdown, plain

_LEGEND = 90
"""Characters of a label in the legend; tables show the whole label."""
_HEADER = (
    *("settings", "runs", "accuracy (%)", "updates", "examples", "seconds", "peak memory (MiB)"),
    "largest batch",
)

_UNFINISHED = ": unfinished)"
"""The end of the label of a run that has a row of its own because it has not ended."""


@dataclass(frozen=True)
class ComparisonRow:
    """Results of runs that differ in their seed only, or of a run that belongs to no mean.

    Figures that were not recorded are nan.

    Attributes:
        settings: the settings in which the group differs from others, and why a run is alone.
        runs: number of runs.
        accuracy: mean final evaluation accuracy, in [0, 1].
        accuracy_std: sample standard deviation of the accuracy over runs; nan for one run.
        updates: mean number of optimizer updates.
        examples: mean number of training examples used.
        seconds: mean wall seconds.
        peak_memory_mib: largest peak memory.
        largest_batch: largest batch size used.
        finished: number of runs that came to their planned end.
    """

    settings: str
    runs: int
    accuracy: float
    accuracy_std: float
    updates: float
    examples: float
    seconds: float
    peak_memory_mib: float
    largest_batch: float
    finished: int


@dataclass(frozen=True)
class ComparisonTable:
    """A table of results, with rows in the order of the runs."""

    rows: tuple[ComparisonRow, ...]

    def cells(self) -> list[list[str]]:
        """Return the text of every cell by lines, the header first, with accuracies in percent."""
        return [list(_HEADER), *(_cells(row) for row in self.rows)]

    def to_markdown(self) -> str:
        """Return a Markdown table, with accuracies and their deviations over runs in percent."""
        head, *lines = [" | ".join(map(in_markdown, line)) for line in self.cells()]
        rule = "|---|" + "---:|" * (len(_HEADER) - 1)
        return "\n".join([f"| {head} |", rule, *(f"| {line} |" for line in lines)]) + "\n"

    def to_csv(self) -> str:
        """Return comma-separated values in full precision, with a header; nan is left empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([f.name for f in fields(ComparisonRow)])
        for row in self.rows:
            figures = ["" if math.isnan(value) else value for value in astuple(row)[1:]]
            writer.writerow([in_csv(row.settings), *figures])
        return buffer.getvalue()


def compare_table(runs: RunSource | Iterable[RunSource]) -> ComparisonTable:
    """Return mean results of runs, grouped by all settings in config.json but the seed.

    Means are taken over finished runs of different seeds. A run that has not ended, and a second
    run of the same seed, has a row of its own that says so; a run that has not ended is shown at
    its last epoch.

    Args:
        runs: run directories or objects with `.records`.
    """
    return ComparisonTable(
        tuple(row for group in group_runs(read_runs(runs)) for row in _rows(group))
    )


def compare(
    runs: RunSource | Iterable[RunSource],
    path: str | Path | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draw evaluation accuracy over optimizer updates and over training time.

    Args:
        runs: run directories or objects with `.records`; those that differ in their seed only share
            a colour.
        path: file for a PNG; None writes none.
        axes: Two axes to draw into; None for a new figure.
    """
    groups = group_runs(read_runs(runs))
    figure, (by_updates, by_seconds) = style.canvas(axes, 9.0, 4.6, 1, 2, sharey=True)
    for index, group in enumerate(groups):
        for run in group.runs:
            rows = run.of_kind("epoch")
            accuracy = 100 * column(rows, "eval_accuracy")
            look = style.look(index, accuracy)
            end = style.marker(index) or "o"
            for panel, x in (
                (by_updates, column(rows, "updates")),
                (by_seconds, np.cumsum(column(rows, "seconds"))),
            ):
                panel.plot(x, accuracy, linewidth=1.3, alpha=0.8, **look)
                panel.plot(x[-1:], accuracy[-1:], end, markersize=5, color=style.colour(index))
    style.finish(by_updates, "optimizer updates", "evaluation accuracy (%)")
    style.finish(by_seconds, "wall time (s)", "")
    style.examples_axis(by_updates)
    style.examples_axis(by_seconds)
    style.legend_below(figure, style.run_handles(_legend(groups)), axes)
    style.save(figure, path)
    return figure


def _legend(groups: Sequence[Group]) -> list[str]:
    """Return labels of the groups that are short enough for a legend, but all different."""
    labels = []
    for group in groups:
        end = ""
        if len(group.runs) > 1:
            end = f" ({len(group.runs)} runs)"
        labels.append(style.cut(group.label, _LEGEND - len(end)) + end)
    numbered = [f"{i}: {style.cut(n, _LEGEND - 4)}" for i, n in enumerate(labels, start=1)]
    return distinct(labels, numbered)


def _rows(group: Group) -> list[ComparisonRow]:
    """Return the mean over a group, and a row for each run that does not belong in it."""
    seeds: list[Any] = []
    members: list[Run] = []
    apart: list[tuple[Run, str]] = []
    for run in group.runs:
        seed = seed_of(run.config)
        if len(group.runs) > 1 and not _is_finished(run):
            apart.append((run, "unfinished"))
        elif seed is not None and seed in seeds:
            apart.append((run, f"seed {seed} again"))
        else:
            seeds.append(seed)
            members.append(run)
    rows = [_row(f"{group.label} ({run.name}: {why})", [run]) for run, why in apart]
    if members:
        rows.insert(0, _row(group.label, members))
    return rows


def _is_finished(run: Run) -> bool:
    return run.summary.get("status") == "finished"


def _row(label: str, runs: Sequence[Run]) -> ComparisonRow:
    accuracies = _known(_final(run, "final_accuracy", "eval_accuracy") for run in runs)
    deviation = math.nan
    if len(accuracies) > 1:
        deviation = statistics.stdev(accuracies)
    return ComparisonRow(
        settings=label,
        runs=len(runs),
        accuracy=_mean(accuracies),
        accuracy_std=deviation,
        updates=_mean(_final(run, "updates", "updates") for run in runs),
        examples=_mean(_final(run, "examples", "examples") for run in runs),
        seconds=_mean(_seconds(run) for run in runs),
        peak_memory_mib=_largest(number(run.summary, "peak_memory_mib") for run in runs),
        largest_batch=_largest(_largest_batch(run) for run in runs),
        finished=sum(map(_is_finished, runs)),
    )


def _final(run: Run, in_summary: str, in_epochs: str) -> float:
    value = number(run.summary, in_summary)
    epochs = run.of_kind("epoch")
    if math.isnan(value) and epochs:
        return number(epochs[-1], in_epochs)
    return value


def _seconds(run: Run) -> float:
    value = number(run.summary, "wall_seconds")
    epochs = column(run.of_kind("epoch"), "seconds")
    if math.isnan(value) and len(epochs):
        return float(epochs.sum())
    return value


def _largest_batch(run: Run) -> float:
    """Return the largest size in the summary, at the ends of epochs, and of steps in between."""
    examples, sizes = batch_steps(run)
    # A size that was decided on at the end, or taken back by a rollback, was not used.
    used = sizes[:-1][np.diff(examples) > 0]
    return _largest(
        [number(run.summary, "largest_batch"), *column(run.of_kind("epoch"), "batch_size"), *used]
    )


def _known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(_known(values) or [math.nan])


def _largest(values: Iterable[float]) -> float:
    return max(_known(values), default=math.nan)


def _cells(row: ComparisonRow) -> list[str]:
    accuracy = style.cell(100 * row.accuracy, ".2f")
    if not math.isnan(row.accuracy_std):
        accuracy += f" ± {100 * row.accuracy_std:.2f}"
    settings = plain(row.settings)
    if row.finished < row.runs and not settings.endswith(_UNFINISHED):
        settings += f" ({row.runs - row.finished} unfinished)"
    return [
        settings,
        str(row.runs),
        accuracy,
        style.cell(row.updates, ".0f"),
        style.cell(row.examples, ".0f"),
        style.cell(row.seconds, ".1f"),
        style.cell(row.peak_memory_mib, ".0f"),
        style.cell(row.largest_batch, ".0f"),
    ]
