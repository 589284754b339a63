"""A figure of accuracy under attack over the size of the perturbation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import style
from hessianflow.runs.text import in_figure, plain

_LONGEST_NAME = 40


def robustness(
    eps: Sequence[float],
    accuracies: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw one line for each attack, with its confidence interval as a band.

    Args:
        eps: sizes of the perturbation, in the units of pixels scaled to [0, 1].
        accuracies: (value, lower end, upper end) for every size, in [0, 1], by name of the attack.
        path: file for a PNG; None writes none.
        ax: Axes to draw into; None for a new figure.

    Raises:
        HessianFlowError: there is no attack, or an attack has not one triple for each size.
    """
    if not accuracies or any(len(triples) != len(eps) for triples in accuracies.values()):
        raise HessianFlowError(
            f"accuracies must hold {len(eps)} triples for each of one or more attacks"
        )
    figure, axes = style.canvas(ax, 6.5, 4.2)
    order = np.argsort(eps)
    sizes = np.asarray(eps, dtype=float)[order]
    for index, (name, triples) in enumerate(accuracies.items()):
        value, low, high = 100 * np.asarray(triples, dtype=float)[order].T
        marker = style.marker(index) or "o"
        colour = style.colour(index)
        label = in_figure(style.cut(plain(name), _LONGEST_NAME))
        axes.plot(sizes, value, marker=marker, color=colour, label=label)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylim(0, 100)
    style.finish(axes, "perturbation (pixel units, 1 = white)", "test accuracy (%)")
    axes.set_title("Accuracy under attack (band: 95 % confidence)", loc="left", fontsize=11)
    axes.legend(frameon=False)
    style.save(figure, path)
    return figure
