"""results.jsonl: one row per finished cell of a grid; and the tables and figures made from it
alone."""

import csv
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from experiments.result_rows import FORMAT, RESULTS, Row, append_row, field, read_rows
from hessianflow.interfaces import HESSIAN
from hessianflow.runs import History
from hessianflow.runs.files import write_text
from hessianflow.runs.text import in_csv, in_figure, in_latex, in_markdown

__all__ = [
    "FORMAT",
    "RESULTS",
    "Group",
    "Row",
    "append_row",
    "draw",
    "field",
    "groups",
    "hardware",
    "read_rows",
    "row_of",
    "write_reports",
]
_COLUMNS = (
    "problem",
    "method",
    "seeds",
    "accuracy",
    "spread",
    "updates",
    "largest batch",
    "seconds",
)


def row_of(problem: str, method: str, settings: Mapping[str, Any], history: History) -> Row:
    """The row of a finished run, but for its format; `settings`: all of them, the seed among
    them."""
    summary = history.summary
    curvature = {
        row["examples"]: row["eigenvalue"]
        for row in history.curvature
        if row.get("matrix", HESSIAN) == HESSIAN
    }
    return {
        "problem": problem,
        "method": method,
        "seed": settings["seed"],
        "accuracy": summary["final_accuracy"],
        "best_accuracy": summary["best_accuracy"],
        "updates": summary["updates"],
        "examples": summary["examples"],
        "largest_batch": summary["largest_batch"],
        "seconds": summary["wall_seconds"],
        "clock_seconds": summary.get("clock_seconds"),
        "seconds_by_part": summary["seconds"],
        "peak_memory_mib": summary["peak_memory_mib"],
        "growths": [
            {key: row[key] for key in ("epoch", "from", "to", "reason")} for row in history.growths
        ],
        "epochs": [
            {
                key: row[key]
                for key in ("batch_size", "lr", "updates", "train_loss", "eval_accuracy")
            }
            | {"eval_loss": row.get("eval_loss"), "eigenvalue": curvature.get(row["examples"])}
            for row in history.epochs
        ],
        "settings": dict(settings),
        "environment": history.config["environment"],
        "hardware": hardware(),
        "date": date.today().isoformat(),
    }


def hardware() -> str:
    """The processor and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()}"
        " cores"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


@dataclass(frozen=True)
class Group:
    """The runs of one method on one problem.

    Attributes:
        problem, method: of the grid.
        rows: one a seed.
    """

    problem: str
    method: str
    rows: Sequence[Row]

    def values(self, name: str) -> list[float]:
        """One figure of every row.

        Raises:
            HessianFlowError: a row without it.
        """
        return [
            float(field(row, name)) for row in sorted(self.rows, key=lambda row: int(row["seed"]))
        ]

    def cells(self) -> dict[str, str]:
        """The line of the table, as text by column."""
        accuracies = [100 * value for value in self.values("accuracy")]
        spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        return {
            "problem": self.problem,
            "method": self.method,
            "seeds": " ".join(f"{value:.2f}" for value in accuracies),
            "accuracy": f"{statistics.mean(accuracies):.2f}",
            "spread": spread,
            "updates": f"{statistics.mean(self.values('updates')):.0f}",
            "largest batch": f"{max(self.values('largest_batch')):.0f}",
            "seconds": f"{statistics.mean(self.values('seconds')):.0f}",
        }


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by problem and method, problems and methods in the order of their first row."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["problem"], row["method"]), []).append(row)
    problems = list(dict.fromkeys(problem for problem, _ in found))
    ordered = sorted(found, key=lambda key: problems.index(key[0]))
    return [Group(problem, method, found[problem, method]) for problem, method in ordered]


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG: for every problem, accuracy against updates, and the batch size by epoch of each
    method's first seed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from hessianflow.plots import style

    found = groups(rows)
    problems = list(dict.fromkeys(group.problem for group in found))
    methods = list(dict.fromkeys(group.method for group in found))
    figure = style.new_figure(9.5, 3.4 * len(problems))
    axes = figure.subplots(len(problems), 2, squeeze=False)
    for (left, right), problem in zip(axes, problems, strict=True):
        here = [group for group in found if group.problem == problem]
        for group in here:
            _draw_group(left, right, group, methods.index(group.method))
        left.set(xscale="log", title=in_figure(problem))
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter("{x:.0f}")
        left.xaxis.set_minor_formatter(NullFormatter())
        left.tick_params(axis="x", which="both", labelsize=7)
        sizes = [
            epoch["batch_size"]
            for group in here
            for row in group.rows
            for epoch in field(row, "epochs")
        ]
        style.batch_axis(right, sizes)
        style.finish(left, "optimizer updates", "test accuracy (%)")
        style.finish(right, "epoch", "batch size")
        columns = -(-len(here) // 14)  # as many names stand beside a panel
        right.legend(
            *left.get_legend_handles_labels(),
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1, 1),
            ncols=columns,
        )
    figure.savefig(path, dpi=110)


def _draw_group(left: Any, right: Any, group: Group, index: int) -> None:
    """A point for every run of a group, a line for its first, in the colour and the marker of the
    method everywhere."""
    from hessianflow.plots import style

    colour, marker = style.colour(index), "os^vDPX*"[index // len(style.COLOURS) % 8]
    accuracies = [100 * value for value in group.values("accuracy")]
    left.plot(
        group.values("updates"),
        accuracies,
        marker,
        markersize=5,
        alpha=0.8,
        color=colour,
        label=in_figure(group.method),
    )
    first = min(group.rows, key=lambda row: int(row["seed"]))
    sizes = [epoch["batch_size"] for epoch in field(first, "epochs")]
    dash = style.dash(index)
    right.step(
        range(1, len(sizes) + 1),
        sizes,
        where="mid",
        linewidth=1.1,
        color=colour,
        alpha=0.8,
        linestyle=dash,
    )


def write_reports(
    rows: Sequence[Row], folder: Path, draw: Callable[[Sequence[Row], Path], None] = draw
) -> list[Path]:
    """Write table.md, table.tex, table.csv, and results.png by `draw`; returns their paths, none
    without rows."""
    if not rows:
        return []
    lines = [group.cells() for group in groups(rows)]
    markdown = [_markdown_line(_COLUMNS), _markdown_line(["---"] * len(_COLUMNS))]
    markdown += [_markdown_line(line.values()) for line in lines]
    table_md, table_tex, table_csv = (folder / f"table.{suffix}" for suffix in ("md", "tex", "csv"))
    write_text(table_md, "\n".join(markdown) + "\n")
    body = [" & ".join(map(in_latex, line.values())) + r" \\" for line in lines]
    header = " & ".join(_COLUMNS) + r" \\ \hline"
    write_text(
        table_tex, "\n".join([r"\begin{tabular}{lllrrrrr}", header, *body, r"\end{tabular}"]) + "\n"
    )
    with open(table_csv, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows({name: in_csv(text) for name, text in line.items()} for line in lines)
    figure = folder / "results.png"
    draw(rows, figure)
    return [table_md, table_tex, table_csv, figure]


def _markdown_line(values: Any) -> str:
    return "| " + " | ".join(map(in_markdown, values)) + " |"
