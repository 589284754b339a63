"""The checks of the value of a setting: its type, its bounds and its spelling.

The same checks apply to settings from the command line, a file, a recorded run and Python.
"""

import math
import types
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError

PathT = TypeVar("PathT", str, str | None)

MOST = 1e9
"""Largest count of anything. This bound, like the next ones, is our choice: a larger count is a
slip, and overflows somewhere."""
MOST_EPOCHS = 1e6
"""Most epochs of a run."""
MOST_PROCESSES = 1024
"""Most threads, processes or workers of a run."""
LARGEST = 1e30
"""Largest learning rate or factor, so that a product of a few still fits into a float32."""
LONGEST_TEXT = 4096
"""Most characters of a name or a path: the longest path of Linux."""
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that no name may hold: control characters, halves of surrogate pairs,
and separators of lines."""
LONGEST = 100
"""Most characters of the user's text that an error repeats."""
_SHOWN = 80
"""Most characters of a wrong value that an error repeats."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, as part of its type: `Annotated[int, Range(1, MOST)]`.

    Attributes:
        low: Smallest number.
        high: Largest number.
        above: Whether `low` itself is too small.
    """

    low: float
    high: float
    above: bool = False

    def check(self, where: str, number: float) -> None:
        """Refuse a number outside the range, or nan; the error names the option `where`."""
        if self.above and number <= self.low:
            raise HessianFlowError(
                f"{where} must be greater than {self.low:g}, got {shown(number)}"
            )
        check_range(where, number, self.low, self.high)


Count = Annotated[int, Range(1, MOST)]
"""A whole number of things of which there is at least one."""
CountOrNone = Annotated[int, Range(0, MOST)]
"""A whole number of things of which there may be none."""
Epochs = Annotated[int, Range(1, MOST_EPOCHS)]
EpochTime = Annotated[float, Range(0, MOST_EPOCHS)]
"""A time in epochs, counted from the start of the run."""
Processes = Annotated[int, Range(1, MOST_PROCESSES)]
Rate = Annotated[float, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_setting(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is of the wrong type for the setting `name`, or out of its bounds.

    None passes if the type `hint`, which holds the :class:`Range`, allows it.
    """
    check_type(option(name), value, hint)


def check_type(where: str, value: Any, hint: Any) -> None:
    """Refuse a value as :func:`check_setting` does; the error names the option `where`."""
    if not _fits(value, hint):
        raise HessianFlowError(f"{where} must be {_described(hint)}, got {shown(value)}")
    if isinstance(value, str) and value not in _words(hint):
        _check_text(where, value)
    for allowed in _ranges(hint):
        for number in _numbers(value):
            allowed.check(where, number)


def check_range(where: str, number: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high], or nan; the error names `where` and the bound."""
    if number < low:
        raise HessianFlowError(f"{where} must be at least {low:g}, got {shown(number)}")
    if number > high:
        raise HessianFlowError(f"{where} must be at most {high:g}, got {shown(number)}")
    if not low <= number <= high:
        raise HessianFlowError(
            f"{where} must be a number from {low:g} to {high:g}, got {shown(number)}"
        )


def check_size(where: str, value: Any, most: float = LARGEST) -> None:
    """Refuse numbers in a value that are nan or beyond `most`, of either sign, as `where`.

    The bounds of an option are its method's own affair; but not every constructor, those of torch
    among them, refuses nan.
    """
    for number in _numbers(value):
        check_range(where, number, -most, most)


def tupled(value: Any) -> Any:
    """Return a value with tuples in place of lists, as deep as they go."""
    if isinstance(value, list | tuple):
        return tuple(tupled(part) for part in value)
    return value


def option(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def user_path(path: PathT, where: str) -> PathT:
    """Return the path with the home folder for a leading `~` or `~NAME`; None stays None."""
    if path is None or not path.startswith("~"):
        return path
    return str(in_home(path, where))


def shown(value: Any) -> str:
    """Return a wrong value as errors repeat it, on one line and cut short if it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    if isinstance(value, (int, float)):
        return shortened(str(value), _SHOWN)
    return shortened(repr(value), _SHOWN)


def shortened(text: str, length: int = LONGEST) -> str:
    """Return the text, cut short if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    return f"{text[:length]}..."


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a type; an integer is a valid float, and a list a valid tuple."""
    kind = get_origin(hint)
    parts = get_args(hint)
    if hint is Any:
        return True
    if kind is Annotated:
        return _fits(value, parts[0])
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        expected = list(parts)
        if parts[-1] is Ellipsis:
            expected = [parts[0]] * len(value)
        return len(value) == len(expected) and all(map(_fits, value, expected))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> set[str]:
    """Return the words that a type lists."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {word for part in get_args(hint) for word in _words(part)}


def _described(hint: Any) -> str:
    """Return a type in plain words."""
    kind = get_origin(hint)
    parts = get_args(hint)
    if kind is Annotated:
        return _described(parts[0])
    if kind in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts if part is not type(None))
    if kind is Literal and len(parts) == 1:
        return repr(parts[0])
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if kind is tuple and parts[-1] is Ellipsis:
        examples = {int: "[30, 60]", float: "[0.1, 0.2]"}
        return f"a list like {examples.get(parts[0], '[[2, 256], [4, 512]]')}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, str(hint)
    )


def without_bounds(hint: Any) -> Any:
    """Return a type without its ranges, the form that the argument parser takes."""
    kind = get_origin(hint)
    parts = get_args(hint)
    if kind is Annotated:
        return parts[0]
    if kind in (Union, types.UnionType):
        return reduce(or_, [without_bounds(part) for part in parts])
    if kind is tuple:
        return types.GenericAlias(tuple, tuple(map(without_bounds, parts)))
    return hint


def _ranges(hint: Any) -> list[Range]:
    """Return the ranges in a type."""
    if isinstance(hint, Range):
        return [hint]
    return [allowed for part in get_args(hint) for allowed in _ranges(part)]


def _numbers(value: Any) -> list[float]:
    """Return every number in a value."""
    if isinstance(value, (tuple, list)):
        return [number for part in value for number in _numbers(part)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return []


def _check_text(where: str, value: str) -> None:
    """Refuse text that can be neither a path nor a name."""
    if not value.strip():
        raise HessianFlowError(f"{where} must not be empty: leave it out instead")
    if len(value) > LONGEST_TEXT:
        raise HessianFlowError(
            f"{where} must be at most {LONGEST_TEXT} characters long, got {len(value)}"
        )
    wrong = next((sign for sign in value if unicodedata.category(sign) in _UNSEEN), None)
    if wrong is not None:
        raise HessianFlowError(
            f"{where} must not hold the character {wrong!a}: records, plots and tables could"
            " not show it"
        )
