"""Who needs fewer updates, and less time, at which accuracy: a table and a figure over groups of
runs."""

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
from hessianflow.plots.records import Run, RunSource, batch_steps, column, number, read_runs
from hessianflow.runs.text import in_csv, in_markdown, plain

_LEGEND = 90
"""Characters of a label in the legend; tables hold it whole."""


_HEADER = (
    *("settings", "runs", "accuracy (%)", "updates", "examples", "seconds", "peak memory (MiB)"),
    "largest batch",
)


_UNFINISHED = ": unfinished)"
"""How the label of a run ends that stands apart because it has not ended."""


@dataclass(frozen=True)
class ComparisonRow:
    """Runs that differ in their seed only, or one that belongs to no mean; nan where nothing was
    recorded.

    Attributes:
        settings: what tells the group from the others, and why a run stands alone.
        runs: number of runs.
        accuracy: mean final evaluation accuracy, in [0, 1].
        accuracy_std: sample standard deviation of it over the runs; nan for one run.
        updates: mean optimizer updates.
        examples: mean training examples used.
        seconds: mean wall seconds.
        peak_memory_mib: largest peak memory.
        largest_batch: largest batch size reached.
        finished: runs that came to their planned end.
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
    """Rows in the order of the runs given."""

    rows: tuple[ComparisonRow, ...]

    def cells(self) -> list[list[str]]:
        """Return the text of every cell, line by line, the header first; accuracy in percent, with
        its deviation."""
        return [list(_HEADER), *(_cells(row) for row in self.rows)]

    def to_markdown(self) -> str:
        """Return a Markdown table; accuracy in percent, plus or minus its standard deviation over
        runs."""
        head, *lines = [" | ".join(map(in_markdown, line)) for line in self.cells()]
        rule = "|---|" + "---:|" * (len(_HEADER) - 1)
        return "\n".join([f"| {head} |", rule, *(f"| {line} |" for line in lines)]) + "\n"

    def to_csv(self) -> str:
        """Return comma-separated values with a header; full precision, empty where nothing was
        recorded."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([f.name for f in fields(ComparisonRow)])
        for row in self.rows:
            values: list[Any] = [in_csv(row.settings), *astuple(row)[1:]]
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in values])
        return buffer.getvalue()


def compare_table(runs: RunSource | Iterable[RunSource]) -> ComparisonTable:
    """Return mean results of runs, grouped by all settings in config.json but the seed.

    A mean is one of finished runs of different seeds. A run that has not ended, and a second one of
    the same seed, has a row of its own that says so; one that has not ended counts with its last
    epoch.

    Args:
        runs: run directories or objects with `.records`.

    Raises:
        HessianFlowError: no run, a folder that is not a run directory, a damaged file.
    """
    return ComparisonTable(
        tuple(row for group in group_runs(read_runs(runs)) for row in _rows(group))
    )


def compare(runs: RunSource | Iterable[RunSource], path: str | Path | None = None) -> Figure:
    """Evaluation accuracy against optimizer updates and against training time, one colour a group
    of runs.

    Args:
        runs: run directories or objects with `.records`; those that differ in their seed only share
            a colour.
        path: where to write a PNG; None: nowhere.

    Returns:
        The figure, not bound to pyplot.

    Raises:
        HessianFlowError: as :func:`compare_table`; an unwritable path.
    """
    groups = group_runs(read_runs(runs))
    figure = style.new_figure(9.0, 4.6)
    by_updates, by_seconds = figure.subplots(1, 2, sharey=True)
    for index, group in enumerate(groups):
        for run in group.runs:
            rows = run.of_kind("epoch")
            accuracy = 100 * column(rows, "eval_accuracy")
            look, end = style.look(index, accuracy), style.marker(index) or "o"
            for axes, x in (
                (by_updates, column(rows, "updates")),
                (by_seconds, np.cumsum(column(rows, "seconds"))),
            ):
                axes.plot(x, accuracy, linewidth=1.3, alpha=0.8, **look)
                axes.plot(x[-1:], accuracy[-1:], end, markersize=5, color=style.colour(index))
    style.finish(by_updates, "optimizer updates", "evaluation accuracy (%)")
    style.finish(by_seconds, "wall time (s)", "")
    style.examples_axis(by_updates)
    style.examples_axis(by_seconds)
    style.legend_below(figure, style.run_handles(_legend(groups)))
    style.save(figure, path)
    return figure


def _legend(groups: Sequence[Group]) -> list[str]:
    """Return what the legend calls the groups: labels short enough for it, still all different."""
    ends = [f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "" for group in groups]
    labels = [
        style.cut(group.label, _LEGEND - len(end)) + end
        for group, end in zip(groups, ends, strict=True)
    ]
    return [
        n if labels.count(n) == 1 else f"{i}: {style.cut(n, _LEGEND - 4)}"
        for i, n in enumerate(labels, start=1)
    ]


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
    rows = [_row(group.label, members)] if members else []
    return rows + [_row(f"{group.label} ({run.name}: {why})", [run]) for run, why in apart]


def _is_finished(run: Run) -> bool:
    return run.summary.get("status") == "finished"


def _row(label: str, runs: Sequence[Run]) -> ComparisonRow:
    accuracies = [
        a for a in (_final(run, "final_accuracy", "eval_accuracy") for run in runs) if a == a
    ]
    return ComparisonRow(
        settings=label,
        runs=len(runs),
        accuracy=_mean(accuracies),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan,
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
    return number(epochs[-1], in_epochs) if math.isnan(value) and epochs else value


def _seconds(run: Run) -> float:
    value = number(run.summary, "wall_seconds")
    epochs = column(run.of_kind("epoch"), "seconds")
    return float(epochs.sum()) if math.isnan(value) and len(epochs) else value


def _largest_batch(run: Run) -> float:
    """Of the summary, the ends of epochs, and the sizes that steps were taken with in between."""
    examples, sizes = batch_steps(run)
    # neither decided on at the end nor taken back by a rollback
    used = sizes[:-1][np.diff(examples) > 0]
    return _largest(
        [number(run.summary, "largest_batch"), *column(run.of_kind("epoch"), "batch_size"), *used]
    )


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else math.nan


def _largest(values: Iterable[float]) -> float:
    return max((v for v in values if not math.isnan(v)), default=math.nan)


def _cells(row: ComparisonRow) -> list[str]:
    accuracy = _cell(100 * row.accuracy, ".2f")
    if not math.isnan(row.accuracy_std):
        accuracy += f" ± {100 * row.accuracy_std:.2f}"
    settings = plain(row.settings)
    if row.finished < row.runs and not settings.endswith(_UNFINISHED):
        settings += f" ({row.runs - row.finished} unfinished)"
    whole: Sequence[float] = (row.updates, row.examples)
    cells = [settings, str(row.runs), accuracy, *(_cell(v, ".0f") for v in whole)]
    return [
        *cells,
        _cell(row.seconds, ".1f"),
        *(_cell(v, ".0f") for v in (row.peak_memory_mib, row.largest_batch)),
    ]


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
