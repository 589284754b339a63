"""How every figure looks and is saved. Figures are made without pyplot, so no global state is read
or left behind."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import replacing
from hessianflow.runs.text import in_figure

# Okabe and Ito's palette, told apart with any common colour blindness; yellow is left out: too
# faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"
DPI = 150
MARKERS = ("", "s", "^", "D")
"""Of the first seven runs, the next seven, ...; dashes are left to what a figure's lines mean, such
as training."""
_MARKS = 8
"""Marks along one line: enough to tell it in a crowd."""
_DARKER, _BLACKS_LIGHTER = 0.65, "#9A9A9A"
_MAX_NAME = 90


def colour(index: int) -> str:
    """Return the colour of the run with this index: seven, then a darker shade of each (grey for
    black), then those again."""
    plain = COLOURS[index % len(COLOURS)]
    if index // len(COLOURS) % 2 == 0:
        return plain
    red, green, blue = (_DARKER * part for part in to_rgb(plain))
    return _BLACKS_LIGHTER if plain == "#000000" else to_hex((red, green, blue))


def marker(index: int) -> str:
    """Return the marker of the run with this index: none for the first seven, another one each time
    the colours repeat."""
    return MARKERS[index // len(COLOURS) % len(MARKERS)]


def look(index: int, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Colour and marks of a line through these values; the same as in the legend of
    :func:`run_handles`."""
    drawn = np.flatnonzero(np.isfinite(np.asarray(values, dtype=float)))
    every = drawn[:: max(1, len(drawn) // _MARKS)]
    return {"color": colour(index), "marker": marker(index), "markersize": 4, "markevery": every}


def dash(index: int) -> Any:
    """Return a line style that changes when the colours repeat, for figures in which dashes mean
    nothing else."""
    return ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))[index // len(COLOURS) % 4]


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """Return an empty figure of this size in inches; "constrained" keeps labels and legends from
    overlapping."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, light grid, open frame."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def examples_axis(axes: Axes) -> None:
    """Counts on the x axis as 50k, 1.5M."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)


def epochs_axis(axes: Axes) -> None:
    """Whole epochs on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)


def batch_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Batch sizes on a base-2 logarithmic y axis, with ticks at the sizes used, as many as are
    readable."""
    axes.set_yscale("log", base=2)
    used = sorted({s for s in sizes if s > 0})
    ticks: list[float] = []
    for size in used:
        if not ticks or math.log2(size / ticks[-1]) >= max(math.log2(used[-1] / used[0]) / 8, 1e-9):
            ticks.append(size)
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_locator(NullLocator())
    if used:
        axes.set_ylim(used[0] / 1.5, used[-1] * 1.5)


def log_axis(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic y axis around the positive ones of these values, with plain numbers on short
    spans."""
    axes.set_yscale("log")
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low, high = min(positive) / 1.3, max(positive) * 1.3
    if high / low < 10:
        low, high = low / 2, high * 2
    axes.set_ylim(low, high)
    if high / low < 1e4 and low > 1e-4:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())


def run_handles(names: Sequence[str]) -> list[Line2D]:
    """One legend entry for each run; long names, which are paths, keep their end, which tells them
    apart."""
    short = [name if len(name) <= _MAX_NAME else "…" + name[1 - _MAX_NAME :] for name in names]
    return [
        Line2D(
            [],
            [],
            color=colour(i),
            marker=marker(i),
            markersize=5,
            linewidth=2,
            label=in_figure(name),
        )
        for i, name in enumerate(short)
    ]


def cut(label: str, room: int = _MAX_NAME) -> str:
    """Return a label of settings, which begin with what matters most, cut on the right to so many
    characters."""
    return label if len(label) <= room else label[: room - 1].rstrip(" ,") + "…"


def legend_columns(handles: Sequence[Line2D]) -> int:
    """Return how many legend columns fit side by side below a figure nine inches wide."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(4, len(handles), 110 // (longest + 8)))


def legend_below(figure: Figure, handles: list[Line2D]) -> None:
    """One legend for the whole figure, outside all axes (constrained layout makes room for it)."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(handles),
        frameon=False,
        fontsize=9,
    )


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def save(figure: Figure, path: str | Path | None) -> None:
    """Write a PNG so that a reader sees the old file or the new one, never half of it; None: do
    nothing.

    Raises:
        HessianFlowError: the folder does not exist or cannot be written, or something other than a
            file is there.
    """
    if path is None:
        return
    try:
        with replacing(in_home(path)) as temporary, without_glyph_warnings():
            figure.savefig(temporary, format="png", dpi=DPI)
    except OSError as error:
        raise HessianFlowError(f"cannot write plot {path}: {error.strerror or error}") from None


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """While drawing, say nothing of signs that the font lacks: names of runs may hold any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield
