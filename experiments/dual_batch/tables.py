"""The study's own table, from results.jsonl alone: `python -m experiments.dual_batch.tables
[FOLDER]` prints it."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.results import RESULTS, Row, read_rows

FOLDER = Path(__file__).resolve().parent
KINDS = ("fixed", "cyclic")
Found = Mapping[tuple[str, str], Sequence[Row]]


def by_method(rows: Sequence[Row]) -> Found:
    """Rows by method and kind (fixed or cyclic), seeds in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault((row["method"], row["problem"].rpartition("-")[2]), []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """A line a plan: accuracy (mean and standard deviation in %, seeds) and predicted seconds,
    fixed and cyclic."""
    found = by_method(rows)
    lines = [
        (
            "| plan | accuracy, full resolution | gain | predicted s | accuracy, cyclic | gain |"
            " predicted s | time |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in sorted(
        {method for method, _ in found}, key=lambda m: (m != "s0", m.partition("-")[2], m)
    ):
        cells = [method]
        for kind in KINDS:
            cells += [_accuracy(found.get((method, kind), ())), _gain(found, method, kind)]
            cells.append(_seconds(found.get((method, kind), ())))
        cells.append(_saved(found, method))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracy(rows: Sequence[Row]) -> str:
    values = [100 * float(row["accuracy"]) for row in rows]
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"


def _gain(found: Found, method: str, kind: str) -> str:
    """Mean difference to no small workers on the same resolutions, over the seeds that both
    have."""
    base = {row["seed"]: float(row["accuracy"]) for row in found.get(("s0", kind), ())}
    pairs = [
        100 * (float(r["accuracy"]) - base[r["seed"]])
        for r in found.get((method, kind), ())
        if r["seed"] in base
    ]
    return f"{statistics.mean(pairs):+.2f}" if pairs and method != "s0" else ""


def _seconds(rows: Sequence[Row]) -> str:
    return f"{statistics.mean(float(row['clock_seconds']) for row in rows):.3f}" if rows else ""


def _saved(found: Found, method: str) -> str:
    """Predicted seconds with resolutions against those without."""
    if not all((method, kind) in found for kind in KINDS):
        return ""
    cyclic, fixed = (
        statistics.mean(r["clock_seconds"] for r in found[method, kind])
        for kind in ("cyclic", "fixed")
    )
    return f"{100 * (cyclic / fixed - 1):+.1f} %"


if __name__ == "__main__":
    print(table(read_rows(Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER) / RESULTS)))
