"""The figure of the study, from its rows alone."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from experiments.results import Row, field
from hessianflow.runs.text import in_figure


def draw(rows: Sequence[Row], path: Path) -> None:
    """For every problem, an optimizer a panel: accuracy against the rate, with and without warm-up,
    every seed."""
    from hessianflow.plots import style

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    optimizers = list(dict.fromkeys(field(row, "settings", "optimizer") for row in rows))
    figure = style.new_figure(3.4 * len(optimizers), 3.2 * len(problems))
    panels = figure.subplots(len(problems), len(optimizers), squeeze=False, sharey="row")
    for line, problem in zip(panels, problems, strict=True):
        for axes, optimizer in zip(line, optimizers, strict=True):
            for index, warm in enumerate((False, True)):
                found = by_rate(rows, problem, optimizer, warm=warm)
                look = {"color": style.colour(index), "linestyle": style.dash(index)}
                means = [statistics.mean(each) for each in found.values()]
                axes.plot(list(found), means, label="with warm-up" if warm else "without", **look)
                points = [(rate, value) for rate, each in found.items() for value in each]
                axes.plot(
                    *zip(*points, strict=True), "o", markersize=3, alpha=0.6, color=look["color"]
                )
            axes.set(xscale="log", title=in_figure(f"{optimizer}, {problem}"))
            style.finish(axes, "learning rate", "test accuracy (%)")
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def by_rate(
    rows: Sequence[Row], problem: str, optimizer: str, *, warm: bool
) -> dict[float, list[float]]:
    """The accuracies, in %, by learning rate in rising order."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        same = row["problem"] == problem and field(row, "settings", "optimizer") == optimizer
        if same and bool(field(row, "settings", "warmup_epochs")) == warm:
            found[float(field(row, "settings", "lr"))].append(100 * field(row, "accuracy"))
    return dict(sorted(found.items()))
