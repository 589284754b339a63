"""The figure of the study, from its rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import Row, field

LEAST = 1e-4
"""The smallest eigenvalue that is drawn."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """For the first seed of the last problem: spectra through training above; top eigenvalue and
    slices below."""
    from hessianflow.plots import style

    problem = rows[-1]["problem"]
    here = [row for row in rows if row["problem"] == problem]
    shown = [row for row in here if row["seed"] == min(row["seed"] for row in here)]
    figure = style.new_figure(10.5, 6.4)
    above, below = figure.subplots(2, 3)
    for axes, row in zip(above, shown, strict=False):
        _spectra(axes, row)
    for index, row in enumerate(shown):
        look = {
            "color": style.colour(index),
            "linestyle": style.dash(index),
            "label": row["method"],
            "linewidth": 1.4,
        }
        below[0].plot(*_tops(row), **look)
        for axes, scaling in zip(below[1:], ("unit", "filter"), strict=True):
            line = field(row, "measured", "slices", scaling)
            axes.plot(line["offsets"], line["losses"], **look)
    below[0].set_yscale("log")
    style.finish(below[0], "epoch", "top eigenvalue")
    style.finish(below[1], "step along the leading eigenvector", "training loss")
    style.finish(below[2], "step along a random direction", "training loss")
    below[0].legend(fontsize=7)
    figure.suptitle(f"{problem}, seed {shown[0]['seed']}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=100)


def _tops(row: Row) -> tuple[range, list[Any]]:
    """Return the epochs and the top eigenvalue recorded at each."""
    epochs = field(row, "epochs")
    return range(1, len(epochs) + 1), [epoch.get("eigenvalue") for epoch in epochs]


def _spectra(axes: Any, row: Row) -> None:
    """The share of eigenvalues that are larger than what the axis says, one line an epoch, darker
    the later."""
    import matplotlib as mpl

    from hessianflow.plots import style

    found = field(row, "measured", "densities")
    for place, one in enumerate(found):
        nodes, weights = np.ravel(one["nodes"]), np.ravel(one["weights"]) / len(one["nodes"])
        order = np.argsort(-nodes)
        values, shares = nodes[order], np.cumsum(weights[order])
        shown = values > LEAST
        colour = mpl.colormaps["viridis_r"](0.15 + 0.85 * place / max(len(found) - 1, 1))
        label = f"epoch {one['epoch']}: top {one['top']:.2g}"
        axes.step(
            values[shown], shares[shown], where="post", color=colour, linewidth=1.2, label=label
        )
    axes.set(xscale="log", yscale="log", xlim=(LEAST, 100), ylim=(1e-6, 1), title=row["method"])
    axes.title.set_fontsize(9)
    style.finish(axes, "eigenvalue", "share of eigenvalues above")
    axes.legend(fontsize=7, loc="lower left")
