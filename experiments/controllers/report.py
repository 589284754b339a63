"""The summary and the figure of the study, from its rows alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.result_rows import read_rows
from experiments.results import Group, Row, groups
from hessianflow.runs.files import write_text

SHOWN = (
    "fixed",
    "timed",
    "absa",
    "critical-reuse",
    "timed-reuse",
    "fixed-cooldown",
    "adamw-1x",
    "adamw-16x",
    "muon-1x",
    "muon-16x",
    "muon-20x",
    "muon-32x",
    "muon-seesaw",
    "muon-critical",
)
"""The methods of the summary and the figure; the table holds all."""
ELSEWHERE = {"cifar-resnet20": "absa_cifar", "cifar-squeezenext": "squeezenext"}
"""Studies that hold the rows of SGD on two of the problems."""


def report(rows: Sequence[Row], path: Path) -> None:
    """Write summary.md beside `path`, and the figure to `path`."""
    found = {(group.problem, group.method): group for group in groups([*rows, *_elsewhere(rows)])}
    problems = list(dict.fromkeys(problem for problem, _ in found))
    methods = [name for name in SHOWN if any(method == name for _, method in found)]
    if not methods:  # Made-up data, of which there is nothing to sum up.
        methods = list(dict.fromkeys(method for _, method in found))
    lines = [["method", *problems], ["---"] * (1 + len(problems))]
    lines += [[m, *(_cell(found.get((p, m))) for p in problems)] for m in methods]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_text(path.parent / "summary.md", text)
    _draw(found, problems, methods, path)


def _elsewhere(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of SGD on the problems that other studies hold, under their names here."""
    here = {row["problem"] for row in rows}
    found: list[Row] = []
    for problem, study in ELSEWHERE.items():
        path = Path(__file__).parents[1] / study / "results.jsonl"
        if problem in here and path.is_file():
            theirs = [row for row in read_rows(path) if row["method"] in ("fixed", "absa")]
            main = theirs[0]["problem"]
            found += [{**row, "problem": problem} for row in theirs if row["problem"] == main]
    return found


def _cell(group: Group | None) -> str:
    """Return mean accuracy, spread or number of seeds, and updates."""
    if group is None:
        return ""
    values = [100 * value for value in group.values("accuracy")]
    spread = "1 seed"
    if len(values) > 1:
        spread = f"{statistics.stdev(values):.2f}"
    updates = statistics.mean(group.values("updates"))
    return f"{statistics.mean(values):.2f} ({spread}), {updates:.0f}"


def _draw(
    found: dict[tuple[str, str], Group], problems: Sequence[str], methods: Sequence[str], path: Path
) -> None:
    """Draw accuracy against updates, one panel for each problem."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from hessianflow.plots import style

    columns = min(4, len(problems) + 1)
    count = -(-(len(problems) + 1) // columns)
    figure = style.new_figure(3.3 * columns, 3.0 * count)
    axes = figure.subplots(count, columns, squeeze=False).flatten()
    for axis, problem in zip(axes, problems, strict=False):
        for index, method in enumerate(methods):
            group = found.get((problem, method))
            if group is not None:
                _point(axis, group, index)
        axis.set(xscale="log", title=problem)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="both", labelsize=7)
        style.finish(axis, "optimizer updates", "test accuracy (%)")
    _names(axes[len(problems)], methods)
    for axis in axes[len(problems) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)


def _look(index: int) -> dict[str, Any]:
    from hessianflow.plots import style

    return {"color": style.colour(index), "marker": "os^vDPX*"[index % 8], "linestyle": "none"}


def _point(axis: Any, group: Group, index: int) -> None:
    values = [100 * value for value in group.values("accuracy")]
    spread = 0.0
    if len(values) > 1:
        spread = statistics.stdev(values)
    updates = statistics.mean(group.values("updates"))
    axis.errorbar(updates, statistics.mean(values), spread, capsize=2, **_look(index))


def _names(axis: Any, methods: Sequence[str]) -> None:
    for index, method in enumerate(methods):
        axis.plot([], [], label=method, **_look(index))
    axis.legend(loc="center", fontsize=8, ncols=2, frameon=False)
