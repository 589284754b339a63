"""The table and the figure of the study, from its rows alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.conadv.grid import METHODS
from experiments.results import Group, Row, field, groups

HEADER = (
    "problem",
    "method",
    "test accuracy",
    "FGSM",
    "PGD",
    "PGD, twice eps",
    "CPU seconds",
    "ratio to clean",
)
ORDER = list(METHODS)
"""Of lines and colours."""


def report(rows: Sequence[Row], path: Path) -> None:
    """Write robustness.md beside `path`, and the figure to `path`."""
    attacked = groups([row for row in rows if "measured" in row])
    # stable: problems stay together below
    attacked = sorted(attacked, key=lambda group: ORDER.index(group.method))
    lines = [HEADER, ["---"] * len(HEADER)]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        found = [group for group in attacked if group.problem == problem]
        clean = {row["seed"]: _seconds(row) for g in found if g.method == "clean" for row in g.rows}
        lines += [_line(group, clean) for group in found]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (path.parent / "robustness.md").write_text(text, "utf-8")
    _draw(attacked, path)


def _line(group: Group, clean: dict[int, float]) -> list[str]:
    """Mean and standard deviation over seeds, in %; seconds and their ratio to clean training of
    the same seed."""
    seconds = [_seconds(row) for row in group.rows]
    ratios = [_seconds(row) / clean[row["seed"]] for row in group.rows if row["seed"] in clean]
    attacks = [
        _accuracies(group, name, index) for name, index in (("fgsm", 0), ("pgd", 0), ("pgd", -1))
    ]
    return [
        group.problem,
        group.method,
        _spread([100 * field(row, "accuracy") for row in group.rows]),
        *(_spread(values) for values in attacks),
        f"{statistics.mean(seconds):.0f}",
        f"{statistics.mean(ratios):.2f}" if ratios else "",
    ]


def _accuracies(group: Group, attack: str, index: int) -> list[float]:
    """Accuracy in % under the attack whose name begins so, at one of the perturbations; one value a
    seed."""
    found = []
    for row in group.rows:
        curves = field(row, "measured", "robustness", "accuracy")
        name = next((name for name in curves if name.startswith(attack)), attack)
        curve = field(row, "measured", "robustness", "accuracy", name)
        found.append(100 * curve[index][0])
    return found


def _seconds(row: Row) -> float:
    return float(field(row, "measured", "cpu_seconds"))


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _draw(found: Sequence[Group], path: Path) -> None:
    """A line a problem: accuracy under PGD against clean accuracy, every seed a point; and what a
    method costs."""
    from matplotlib.lines import Line2D

    from hessianflow.plots import style

    problems = list(dict.fromkeys(group.problem for group in found))
    looks = {method: _look(index) for index, method in enumerate(ORDER)}
    figure = style.new_figure(9, 3.2 * len(problems))
    for (left, right), problem in zip(
        figure.subplots(len(problems), 2, squeeze=False), problems, strict=True
    ):
        for group in (each for each in found if each.problem == problem):
            look = looks[group.method]
            clean = [100 * field(row, "accuracy") for row in group.rows]
            left.plot(clean, _accuracies(group, "pgd", 0), **look)
            seconds = statistics.mean(map(_seconds, group.rows))
            right.barh(group.method, seconds, color=look["color"])
        left.set_title(problem)
        right.invert_yaxis()
        style.finish(left, "test accuracy (%)", "accuracy under PGD (%)")
        style.finish(right, "processor seconds of training", "")
    used = {group.method for group in found}
    style.legend_below(
        figure, [Line2D([], [], label=name, **look) for name, look in looks.items() if name in used]
    )
    figure.savefig(path, dpi=100)


def _look(index: int) -> dict[str, Any]:
    from hessianflow.plots import style

    colour = style.colour(index) if index < len(style.COLOURS) else style.GREY
    return {"color": colour, "marker": "os^v"[index % 4], "markersize": 5, "linestyle": ""}
