"""The table and the figure of the study, from its rows alone."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.language.grid import SMALL_BATCH
from experiments.results import Group, Row, field, groups
from hessianflow.runs.files import write_text

HEADER = (
    "method",
    "seeds",
    "held-out loss (nats)",
    "bits per byte",
    "updates",
    "share of updates",
    "largest batch",
    "seconds",
)
REFERENCE = "adamw-1x"
"""The method with the small batch, with which all others are compared."""


def report(rows: Sequence[Row], path: Path) -> None:
    """Write language.md beside `path`, and the figure to `path`."""
    lines = [HEADER, ["---"] * len(HEADER)]
    found = groups(rows)
    for group in found:
        reference = [g for g in found if (g.problem, g.method) == (group.problem, REFERENCE)]
        lines.append(_line(group, (reference or [group])[0]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_text(path.parent / "language.md", text)
    shown = [g for g in found if g.problem != "tuning" and not g.method.endswith("-measured")]
    _draw(shown or found, path)


def loss(row: Row) -> float:
    """Return the held-out loss at the end of a run, in nats per byte."""
    return float(field(field(row, "epochs")[-1] | _names(row), "eval_loss"))


def _names(row: Row) -> Row:
    return {name: row[name] for name in ("problem", "method")}


def _line(group: Group, reference: Group) -> list[str]:
    losses = [loss(row) for row in group.rows]
    updates = statistics.mean(group.values("updates"))
    name = group.method
    if group.problem != "python":
        name = f"{group.problem} {group.method}"
    return [
        name,
        str(len(losses)),
        " ".join(f"{value:.3f}" for value in losses),
        f"{statistics.mean(losses) / math.log(2):.3f}",
        f"{updates:.0f}",
        f"{updates / statistics.mean(reference.values('updates')):.2f}",
        f"{max(group.values('largest_batch')):.0f}",
        f"{statistics.mean(group.values('seconds')):.0f}",
    ]


def _draw(found: Sequence[Group], path: Path) -> None:
    """Draw held-out loss against updates, bytes and seconds, and the batch by epoch."""
    from hessianflow.plots import style

    figure = style.new_figure(13, 4)
    axes = figure.subplots(1, 4)
    for index, group in enumerate(found):
        row = min(group.rows, key=lambda row: int(row["seed"]))
        look = {"color": style.colour(index), "linestyle": style.dash(index), "linewidth": 1.2}
        look |= {"marker": "os^vDPX*"[index // len(style.COLOURS) % 8], "markersize": 3}
        _draw_row(axes, row, {**look, "label": group.method})
    for axis, what in zip(axes, ("updates", "training bytes", "seconds", "pass"), strict=True):
        ylabel = "held-out loss (nats per byte)" if axis is axes[0] else ""
        style.finish(axis, what, ylabel)
    axes[0].set_xscale("log")
    axes[3].set(yscale="log", title="blocks per step", yticks=_sizes(found))
    axes[3].yaxis.set_major_formatter("{x:.0f}")
    axes[3].minorticks_off()
    axes[3].legend(*axes[0].get_legend_handles_labels(), fontsize=7, bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def _draw_row(axes: Any, row: Row, look: dict[str, Any]) -> None:
    epochs = field(row, "epochs")
    settings = field(row, "settings")
    losses = [field(epoch | _names(row), "eval_loss") for epoch in epochs]
    numbers = range(1, len(epochs) + 1)
    passes = [number / (settings.get("epoch_parts") or 1) for number in numbers]
    length = settings["block_length"] * settings["train_examples"]
    axes[0].plot([epoch["updates"] for epoch in epochs], losses, **look)
    axes[1].plot([count * length for count in passes], losses, **look)
    axes[2].plot([number * row["seconds"] / len(epochs) for number in numbers], losses, **look)
    axes[3].plot(passes, [epoch["batch_size"] for epoch in epochs], **look)


def _sizes(found: Sequence[Group]) -> list[int]:
    largest = max(max(group.values("largest_batch")) for group in found)
    return [SMALL_BATCH * 2**power for power in range(int(math.log2(largest / SMALL_BATCH)) + 1)]
