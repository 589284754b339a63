"""Marks for changes of the batch size: numbers above the axes, and a key of reasons below."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from hessianflow.plots.records import Run, number
from hessianflow.runs.text import in_figure, plain

# A longer key would be larger than its picture; the rest is counted.
MAX_KEY_LINES = 12
_MAX_REASON = 70
_CHARACTER_POINTS = 5.5
_PADDING_POINTS = 5.0


@dataclass(frozen=True)
class Growth:
    """One change of the batch size.

    Attributes:
        examples: training examples used when it happened.
        text: the change and its reason, on one line.
        colour: the colour of its run.
    """

    examples: float
    text: str
    colour: str


def growths(run: Run, colour: str) -> list[Growth]:
    """Return every change of the batch size of a run, in order."""
    events = []
    for row in run.of_kind("batch"):
        before = number(row, "from")
        after = number(row, "to")
        examples = number(row, "examples")
        if before != after and examples >= 0 and after > 0:
            reason = plain(str(row.get("reason") or "no reason recorded"))
            if len(reason) > _MAX_REASON:
                reason = reason[: _MAX_REASON - 1].rstrip() + "…"
            events.append(Growth(examples, f"{before:g} → {after:g}: {reason}", colour))
    return events


def mark(axes: Axes, events: Sequence[Growth], width_points: float) -> None:
    """Draw a thin line at every event, in order of `examples`, and its number above the axes.

    Events that are too close for labels of their own share one with a range of numbers. The x axis
    has examples, and the axes are `width_points` wide.
    """
    left, right = axes.get_xlim()
    points = width_points / max(right - left, 1e-9)
    for event in events:
        axes.axvline(
            event.examples, color=event.colour, linewidth=0.8, linestyle=":", alpha=0.7, zorder=1
        )
    for first, last in cluster([event.examples * points for event in events]):
        centre = (events[first].examples + events[last].examples) / 2
        colours = {event.colour for event in events[first : last + 1]}
        colour = "black"
        if len(colours) == 1:
            colour = colours.pop()
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "annotation_clip": False}
        place |= {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(_label(first, last), (centre, 1.0), color=colour, fontsize=8, **place)


def cluster(positions: Sequence[float]) -> list[tuple[int, int]]:
    """Return groups (first, last index) whose labels do not touch, for positions in points."""
    groups: list[tuple[int, int]] = []
    for index in range(len(positions)):
        groups.append((index, index))
        while len(groups) > 1 and _touch(positions, groups[-2], groups[-1]):
            groups[-2:] = [(groups[-2][0], groups[-1][1])]
    return groups


def key(events: Sequence[Growth]) -> list[tuple[str, str]]:
    """Return (text, colour) of each line of the key; the last line counts the events left out."""
    lines = [
        (in_figure(f"{i}  {event.text}"), event.colour) for i, event in enumerate(events, start=1)
    ]
    if len(lines) <= MAX_KEY_LINES:
        return lines
    rest = len(lines) - MAX_KEY_LINES + 1
    return [*lines[: MAX_KEY_LINES - 1], (f"… and {rest} more, listed in history.jsonl", "black")]


def _label(first: int, last: int) -> str:
    if first == last:
        return str(first + 1)
    return f"{first + 1}-{last + 1}"


def _touch(positions: Sequence[float], a: tuple[int, int], b: tuple[int, int]) -> bool:
    def centre(group: tuple[int, int]) -> float:
        return (positions[group[0]] + positions[group[1]]) / 2

    widths = (len(_label(*a)) + len(_label(*b))) / 2 * _CHARACTER_POINTS
    return centre(b) - centre(a) < widths + _PADDING_POINTS
