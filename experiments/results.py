"""results.jsonl: one row per finished cell of a grid; and the tables and figures made from it alone.

Every row carries its `format`. Rows of another format are left in the file, reported and not used, so their cells run
again; a last line cut short by a crash is cut off. Of several rows of one cell the last counts.
"""

import csv
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from hessianflow.interfaces import HessianFlowError
from hessianflow.training import History

FORMAT = 1
RESULTS = "results.jsonl"
Row = dict[str, Any]
_COLUMNS = ("problem", "method", "seeds", "accuracy", "spread", "updates", "largest batch", "seconds")


def read_rows(path: Path) -> list[Row]:
    """The usable rows of a results file, the newest per (problem, method, seed); none where there is no file.

    Raises:
        HessianFlowError: a line before the last is not a JSON object, or does not say which cell it is of.
    """
    found: dict[tuple[str, str, int], Row] = {}
    foreign = 0
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise HessianFlowError(f"{path} line {number} is not a JSON object: mend it or move the file away")
        if row.get("format") != FORMAT:
            foreign += 1
            continue
        lacking = [name for name in ("problem", "method", "seed") if name not in row]
        if lacking:
            raise HessianFlowError(f"{path} line {number} has no {', '.join(lacking)}: mend it or delete the line")
        found[row["problem"], row["method"], row["seed"]] = row
    if foreign:
        sys.stderr.write(f"{path}: {foreign} rows of a format other than {FORMAT} not used; their cells run again\n")
    return list(found.values())


def row_of(problem: str, method: str, settings: Mapping[str, Any], history: History) -> Row:
    """The row of a finished run, but for its format; `settings`: all of them, the seed among them."""
    summary = history.summary
    curvature = {row["examples"]: row["eigenvalue"] for row in history.curvature}
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
        "growths": [{key: row[key] for key in ("epoch", "from", "to", "reason")} for row in history.growths],
        "epochs": [
            {key: row[key] for key in ("batch_size", "lr", "updates", "train_loss", "eval_accuracy")}
            | {"eigenvalue": curvature.get(row["examples"])}
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
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; what a crash left of an unfinished line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        whole = "".join(line + "\n" for line in _whole_lines(path))
        if path.read_text("utf-8") != whole:
            path.write_text(whole, "utf-8")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, **row}, allow_nan=False) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; the last one only if it is whole: valid JSON, or ended."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and not text.endswith("\n"):
        try:
            json.loads(lines[-1])
        except ValueError:
            return lines[:-1]
    return lines


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
        if any(name not in row for row in self.rows):
            raise HessianFlowError(
                f"a row of {self.problem} {self.method} has no {name}: delete it, its cell runs again"
            )
        return [float(row[name]) for row in sorted(self.rows, key=lambda row: int(row["seed"]))]

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
    """A PNG: for every problem, accuracy against updates, and the batch size by epoch of each method's first seed."""
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
        left.set(xscale="log", title=problem)
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter("{x:.0f}")
        left.xaxis.set_minor_formatter(NullFormatter())
        left.tick_params(axis="x", which="both", labelsize=7)
        style.batch_axis(
            right, [epoch["batch_size"] for group in here for row in group.rows for epoch in row["epochs"]]
        )
        style.finish(left, "optimizer updates", "test accuracy (%)")
        style.finish(right, "epoch", "batch size")
        columns = -(-len(here) // 14)  # as many names stand beside a panel
        right.legend(
            *left.get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns
        )
    figure.savefig(path, dpi=110)


def _draw_group(left: Any, right: Any, group: Group, index: int) -> None:
    """A point for every run of a group, a line for its first, in the colour and the marker of the method everywhere."""
    from hessianflow.plots import style

    colour, marker = style.colour(index), "os^vDPX*"[index // len(style.COLOURS) % 8]
    accuracies = [100 * value for value in group.values("accuracy")]
    left.plot(group.values("updates"), accuracies, marker, markersize=5, alpha=0.8, color=colour, label=group.method)
    sizes = [epoch["batch_size"] for epoch in min(group.rows, key=lambda row: row["seed"])["epochs"]]
    dash = style.dash(index)
    right.step(range(1, len(sizes) + 1), sizes, where="mid", linewidth=1.1, color=colour, alpha=0.8, linestyle=dash)


def write_reports(rows: Sequence[Row], folder: Path, draw: Callable[[Sequence[Row], Path], None] = draw) -> list[Path]:
    """Write table.md, table.tex, table.csv, and results.png by `draw`; returns their paths, none without rows."""
    if not rows:
        return []
    lines = [group.cells() for group in groups(rows)]
    markdown = [_markdown_line(_COLUMNS), _markdown_line(["---"] * len(_COLUMNS))]
    markdown += [_markdown_line(line.values()) for line in lines]
    table_md, table_tex, table_csv = (folder / f"table.{suffix}" for suffix in ("md", "tex", "csv"))
    table_md.write_text("\n".join(markdown) + "\n", "utf-8")
    body = [" & ".join(map(_latex, line.values())) + r" \\" for line in lines]
    header = " & ".join(_COLUMNS) + r" \\ \hline"
    table_tex.write_text("\n".join([r"\begin{tabular}{lllrrrrr}", header, *body, r"\end{tabular}"]) + "\n", "utf-8")
    with open(table_csv, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    figure = folder / "results.png"
    draw(rows, figure)
    return [table_md, table_tex, table_csv, figure]


def _markdown_line(values: Any) -> str:
    return "| " + " | ".join(values) + " |"


def _latex(text: str) -> str:
    return "".join("\\" + sign if sign in "_%&#$" else sign for sign in text)
