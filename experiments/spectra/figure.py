"""The figure of the study, from its rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import Row

FLOOR = 1e-7
"""Densities below this are not drawn."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """For the first seed of the last problem: densities through training above; eigenvalue and slices below."""
    from hessianflow.plots import style

    problem = rows[-1]["problem"]
    here = [row for row in rows if row["problem"] == problem]
    shown = [row for row in here if row["seed"] == min(row["seed"] for row in here)]
    figure = style.new_figure(10.5, 6.4)
    above, below = figure.subplots(2, 3)
    low = min(_nodes(row).min() for row in shown)
    high = max(_nodes(row).max() for row in shown)
    for axes, row in zip(above, shown, strict=False):
        _densities(axes, row, low, high)
    for index, row in enumerate(shown):
        look = {"color": style.colour(index), "linestyle": style.dash(index), "label": row["method"], "linewidth": 1.4}
        below[0].plot(range(1, len(row["epochs"]) + 1), [epoch["eigenvalue"] for epoch in row["epochs"]], **look)
        for axes, scaling in zip(below[1:], ("unit", "filter"), strict=True):
            line = row["measured"]["slices"][scaling]
            axes.plot(line["offsets"], line["losses"], **look)
    below[0].set_yscale("log")
    style.finish(below[0], "epoch", "top eigenvalue")
    style.finish(below[1], "step along the leading eigenvector", "training loss")
    style.finish(below[2], "step along a random direction", "training loss")
    below[0].legend(fontsize=7)
    figure.suptitle(f"{problem}, seed {shown[0]['seed']}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=100)


def _nodes(row: Row) -> Any:
    return np.concatenate([np.ravel(one["nodes"]) for one in row["measured"]["densities"]])


def _densities(axes: Any, row: Row, low: float, high: float) -> None:
    """One line an epoch, darker the later."""
    import matplotlib as mpl

    from hessianflow.plots import style
    from hessianflow.plots.spectra import broaden

    width = 0.01 * (high - low)
    grid = np.linspace(low - 5 * width, high + 5 * width, 1000)
    found = row["measured"]["densities"]
    for place, one in enumerate(found):
        mean, _ = broaden(np.asarray(one["nodes"]), np.asarray(one["weights"]), grid, width)
        colour = mpl.colormaps["viridis_r"](0.15 + 0.85 * place / max(len(found) - 1, 1))
        axes.plot(grid, mean, color=colour, linewidth=1.2, label=f"epoch {one['epoch']}: top {one['top']:.3g}")
    axes.set(yscale="log", ylim=(FLOOR, None), title=row["method"])
    axes.title.set_fontsize(9)
    style.finish(axes, "eigenvalue", "density")
    axes.legend(fontsize=7)
