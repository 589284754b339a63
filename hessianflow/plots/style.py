"""The look of all figures, and how they are saved; pyplot and its global state are not used."""

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
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
from hessianflow.runs.files import replacing, telling
from hessianflow.runs.text import in_figure

# Okabe and Ito's palette, which is distinct under any common colour blindness. Yellow is left out,
# because it is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"
DPI = 150
MARKERS = ("", "s", "^", "D")
"""Markers of the first seven runs, the next seven, and so on. Dashes are free for other meanings of
lines, such as training."""
_MARKS = 8
"""Marks along one line, enough to recognise it in a crowd."""
_DARKER = 0.65
_LIGHTER_BLACK = "#9A9A9A"
_MAX_NAME = 90


def colour(index: int) -> str:
    """Return the colour of a run: seven colours, then darker shades (grey for black)."""
    plain = COLOURS[index % len(COLOURS)]
    if index // len(COLOURS) % 2 == 0:
        return plain
    if plain == "#000000":
        return _LIGHTER_BLACK
    red, green, blue = (_DARKER * channel for channel in to_rgb(plain))
    return to_hex((red, green, blue))


def marker(index: int) -> str:
    """Return the marker of a run, which changes when the colours repeat; the first is none."""
    return MARKERS[index // len(COLOURS) % len(MARKERS)]


def look(index: int, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return colour and marks of a run's line through these values, as in :func:`run_handles`."""
    drawn = np.flatnonzero(np.isfinite(np.asarray(values, dtype=float)))
    every = drawn[:: max(1, len(drawn) // _MARKS)]
    mark = marker(index)
    if len(drawn) == 1 and not mark:  # A line through a single value would be invisible.
        mark = "o"
    return {"color": colour(index), "marker": mark, "markersize": 4, "markevery": every}


def dash(index: int) -> Any:
    """Return a line style that changes when the colours repeat; not where dashes mean more."""
    return ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))[index // len(COLOURS) % 4]


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """Return an empty figure of this size in inches.

    The layout "constrained" keeps labels and legends from overlapping.
    """
    figure = Picture(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


class Picture(Figure):
    """A figure that a notebook shows as a picture, even if pyplot is not set up there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with without_glyph_warnings():
            self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def canvas(
    own: Any, width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes: the user's own, or new ones.

    Args:
        own: The user's axes, several of them in an array or a list; None for a new figure.
        width: Width of a new figure in inches.
        height: Height of a new figure in inches.
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        options: Options of `Figure.subplots`.

    Returns:
        The figure, and the axes as `Figure.subplots` returns them.

    Raises:
        HessianFlowError: `own` does not hold as many axes as the figure needs.
    """
    if own is None:
        figure = new_figure(width, height)
        return figure, figure.subplots(rows, columns, **options)
    axes = np.asarray(own, dtype=object)
    if axes.size != rows * columns:
        raise HessianFlowError(
            f"this figure needs {rows * columns} axes, got {axes.size}: pass the axes of"
            f" matplotlib.pyplot.subplots({rows}, {columns})"
        )
    figure = axes.flat[0].get_figure(root=True)
    if axes.size == 1:
        return figure, axes.flat[0]
    return figure, axes.reshape([size for size in (rows, columns) if size > 1])


def finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Add labels and a light grid, and open the frame."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def examples_axis(axes: Axes) -> None:
    """Write counts on the x axis as 50k, 1.5M."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)


def epochs_axis(axes: Axes) -> None:
    """Put ticks at whole epochs on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)


def batch_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Use a base-2 logarithmic y axis, with readable ticks at the batch sizes used."""
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
    """Use a logarithmic y axis around the positive values, with plain numbers on short spans."""
    axes.set_yscale("log")
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low = min(positive) / 1.3
    high = max(positive) * 1.3
    if high / low < 10:
        low /= 2
        high *= 2
    axes.set_ylim(low, high)
    if high / low < 1e4 and low > 1e-4:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())


def run_handles(names: Sequence[str]) -> list[Line2D]:
    """Return one legend entry for each run; long names, which are paths, keep their end."""
    handles = []
    for index, name in enumerate(names):
        if len(name) > _MAX_NAME:
            name = "…" + name[1 - _MAX_NAME :]
        look: dict[str, Any] = {"color": colour(index), "marker": marker(index), "linewidth": 2}
        handles.append(Line2D([], [], label=in_figure(name), markersize=5, **look))
    return handles


def cut(label: str, room: int = _MAX_NAME) -> str:
    """Return a label cut on the right to `room` characters; what matters most comes first in it."""
    if len(label) <= room:
        return label
    return label[: room - 1].rstrip(" ,") + "…"


def cell(value: float | None, form: str) -> str:
    """Return a number as the text of a table's cell; nan and None become "-"."""
    if value is None or math.isnan(value):
        return "-"
    return format(value, form)


def legend_columns(handles: Sequence[Artist]) -> int:
    """Return the number of legend columns that fit below a figure nine inches wide."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(4, len(handles), 110 // (longest + 8)))


def legend_below(figure: Figure, handles: Sequence[Artist], own: Any = None) -> None:
    """Add one legend below all axes, for which the constrained layout makes room.

    If the user's `own` axes are given, the legend goes into the last of them.
    """
    look: dict[str, Any] = {"ncols": legend_columns(handles), "frameon": False, "fontsize": 9}
    if own is not None:
        last = np.asarray(own, dtype=object).flat[-1]
        last.legend(handles=handles, frameon=False, fontsize=8)
        return
    figure.legend(handles=handles, loc="outside lower center", **look)


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def save(figure: Figure, path: str | Path | None) -> None:
    """Write a PNG whole, so that a reader sees the old file or the new one; None does nothing."""
    if path is None:
        return
    with telling("write plot", path), replacing(in_home(path)) as file, without_glyph_warnings():
        figure.savefig(file, format="png", dpi=DPI)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Silence warnings of characters that the font lacks, which names of runs may hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield
