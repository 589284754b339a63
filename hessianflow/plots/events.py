"""Marks for growth events: numbers on top of the axes that never overlap, and a key below that
gives the reasons."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from hessianflow.plots.records import Run, number
from hessianflow.runs.text import in_figure, plain

# A key longer than this hides the picture it belongs to; the rest is counted.
MAX_KEY_LINES = 12
_MAX_REASON = 70
_CHARACTER_POINTS = 5.5
_PADDING_POINTS = 5.0


@dataclass(frozen=True)
class Growth:
    """One change of the batch size.

    Attributes:
        examples: training examples used when it happened.
        text: what changed and why, on one line.
        colour: of the run it belongs to.
    """

    examples: float
    text: str
    colour: str


def growths(run: Run, colour: str) -> list[Growth]:
    """Return every change of the batch size of a run, in order."""
    events = []
    for row in run.of_kind("batch"):
        before, after = number(row, "from"), number(row, "to")
        if before != after and number(row, "examples") >= 0 and after > 0:
            reason = plain(str(row.get("reason") or "no reason recorded"))
            short = (
                reason if len(reason) <= _MAX_REASON else reason[: _MAX_REASON - 1].rstrip() + "…"
            )
            events.append(
                Growth(number(row, "examples"), f"{before:g} → {after:g}: {short}", colour)
            )
    return events


def mark(axes: Axes, events: Sequence[Growth], width_points: float) -> None:
    """A thin line at every event, and its number (or the range of numbers of a crowd) above the
    axes.

    Args:
        events: in order of `examples`.
        width_points: width of the axes, to tell when labels would touch.
    """
    left, right = axes.get_xlim()
    points = width_points / max(right - left, 1e-9)
    for event in events:
        axes.axvline(
            event.examples, color=event.colour, linewidth=0.8, linestyle=":", alpha=0.7, zorder=1
        )
    for first, last in cluster([event.examples * points for event in events]):
        centre = (events[first].examples + events[last].examples) / 2
        same = {event.colour for event in events[first : last + 1]}
        axes.annotate(
            _label(first, last),
            (centre, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=same.pop() if len(same) == 1 else "black",
            annotation_clip=False,
        )


def cluster(positions: Sequence[float]) -> list[tuple[int, int]]:
    """Group events (first, last index) so that the labels of neighbouring groups do not touch;
    positions in points."""
    groups: list[tuple[int, int]] = []
    for index in range(len(positions)):
        groups.append((index, index))
        while len(groups) > 1 and _touch(positions, groups[-2], groups[-1]):
            groups[-2:] = [(groups[-2][0], groups[-1][1])]
    return groups


def key(events: Sequence[Growth]) -> list[tuple[str, str]]:
    """(text, colour) of each line of the key; the last one counts what did not fit."""
    lines = [
        (in_figure(f"{i}  {event.text}"), event.colour) for i, event in enumerate(events, start=1)
    ]
    if len(lines) <= MAX_KEY_LINES:
        return lines
    rest = len(lines) - MAX_KEY_LINES + 1
    return [*lines[: MAX_KEY_LINES - 1], (f"… and {rest} more, listed in history.jsonl", "black")]


def _label(first: int, last: int) -> str:
    return str(first + 1) if first == last else f"{first + 1}-{last + 1}"


def _touch(positions: Sequence[float], a: tuple[int, int], b: tuple[int, int]) -> bool:
    def centre(group: tuple[int, int]) -> float:
        return (positions[group[0]] + positions[group[1]]) / 2

    widths = (len(_label(*a)) + len(_label(*b))) / 2 * _CHARACTER_POINTS
    return centre(b) - centre(a) < widths + _PADDING_POINTS
