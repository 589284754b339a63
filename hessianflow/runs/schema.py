"""Check that a value has the form that a type describes, for records, settings and checkpoints.

Forms are ordinary types, which mypy uses too: TypedDicts of numbers, text, lists and further
TypedDicts, and `Annotated[int, Between(1, 10)]` for a number with bounds. A message names the
field that is wrong and its value.
"""

import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch

LARGEST = 1e100
"""Largest magnitude of a figure. This default is our choice: far above any loss or eigenvalue, and
its square still fits a float64."""
LARGEST_WHOLE = 2**63 - 1
"""Largest whole number without bounds of its own: the largest that NumPy and torch can hold."""
LARGEST_COUNT = 2**53
"""Largest count: up to here, float64 represents every whole number exactly."""
_SHOWN = 60
"""Most characters of a value in a message."""


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number, for an `Annotated` type."""

    low: float
    high: float


Count = Annotated[int, Between(0, LARGEST_COUNT)]
"""A number of examples, updates or epochs."""
Size = Annotated[int, Between(1, LARGEST_COUNT)]
"""A count of at least one."""
Figure = float | None
"""A measured number; null if it was not finite."""
Number = Annotated[float, Between(-math.inf, math.inf)]
"""A number that may be infinite."""
Share = Annotated[float, Between(0, 1 + 1e-6)] | None
"""A fraction, such as an accuracy, with room for rounding; null if it was not measured."""


@dataclass(frozen=True)
class Fault:
    """The first fault of a value.

    Attributes:
        where: Path of the faulty field, such as "trainer.epochs"; empty for the value itself.
        words: Description of the fault.
        of_kind: Whether the value is of the right kind (a number, a list) and wrong only in
            content.
    """

    where: str
    words: str
    of_kind: bool = True

    def __str__(self) -> str:
        return f"{self.where} {self.words}".strip()

    def inside(self, name: str) -> "Fault":
        """Return the same fault with a path that begins with the field `name`."""
        where = f"{name}.{self.where}" if self.where else name
        return replace(self, where=where, of_kind=True)


Check = Callable[[Any], Fault | None]


def fault_of(value: Any, form: Any) -> Fault | None:
    """Return the first fault of `value` against the form of a type; None if it fits.

    Fields that a TypedDict does not name may hold anything.
    """
    return checker(form)(value)


@cache
def checker(form: Any) -> Check:
    """Return the check of one type; it is made once and cached."""
    if typing.is_typeddict(form):
        return _fields_check(form)
    origin = get_origin(form)
    parts = get_args(form)
    if origin in (Union, types.UnionType):
        return _union_check(form, parts)
    if origin is Annotated:
        return _bounded_check(*parts)
    if origin is tuple and not (len(parts) == 2 and parts[1] is Ellipsis):
        return _tuple_check(form, parts)
    if origin in (list, tuple):
        return _items_check(form, parts[0])
    if origin is dict:
        return _entries_check(form, *parts)
    return _simple_check(form)


def first_fault(value: Any, check: Check) -> Fault | None:
    """Return the first fault of the entries of a dict, list or tuple; other values have none."""
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(value)
    for name, entry in entries:
        fault = check(entry)
        if fault is not None:
            return fault.inside(str(name))
    return None


def in_words(form: Any) -> str:
    """Return the description of a type for a message, such as "a number or null"."""
    origin = get_origin(form)
    parts = get_args(form)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in parts))
    if origin is Annotated:
        return in_words(parts[0])
    if origin in (list, tuple):
        return "a list"
    if origin is dict or typing.is_typeddict(form):
        return "an object"
    return _WORDS.get(form, getattr(form, "__name__", str(form)))


def shown(value: Any) -> str:
    """Return a value as a message shows it: as JSON if possible, and cut short if long."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (dict, list, tuple, set)) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = json.dumps(value, default=_kind, skipkeys=True)
    except (ValueError, RecursionError):  # deeper or longer than JSON goes
        text = _kind(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


_WORDS: Mapping[Any, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    torch.Tensor: "a tensor",
}


def _refusal(form: Any, value: Any) -> Fault:
    return Fault("", f"must be {in_words(form)}, got {shown(value)}", of_kind=False)


def _simple_check(form: Any) -> Check:
    if form is Any:
        return lambda _value: None
    if form is float:
        return _number_fault
    if form is int:
        return _whole_fault
    kind = type(None) if form is None else form

    def check(value: Any) -> Fault | None:
        if isinstance(value, kind):
            return None
        return _refusal(kind, value)

    return check


def _whole_fault(value: Any) -> Fault | None:
    if type(value) is not int:
        return _refusal(int, value)
    if abs(value) <= LARGEST_WHOLE:
        return None
    return Fault("", f"must be below 2^63, got {_short(value)}")


def _number_fault(value: Any) -> Fault | None:
    if type(value) not in (float, int):
        return _refusal(float, value)
    if isinstance(value, float) and not math.isfinite(value):
        return Fault("", f"must be a finite number, got {value}")
    if abs(value) <= LARGEST:
        return None
    return Fault("", f"must be at most {LARGEST:g}, got {_short(value)}")


def _short(value: float) -> str:
    """Return a number as short text, however large it is."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"one of about {int(value.bit_length() * 0.301)} digits"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bounded_check(form: Any, bounds: Between) -> Check:
    kinds = (int,) if form is int else (int, float)

    def check(value: Any) -> Fault | None:
        if type(value) not in kinds:
            return _refusal(form, value)
        if value < bounds.low:
            return Fault("", f"must be at least {bounds.low:g}, got {_short(value)}")
        if value <= bounds.high:
            return None
        return Fault("", f"must be at most {bounds.high:.16g}, got {_short(value)}")

    return check


def _union_check(form: Any, parts: Sequence[Any]) -> Check:
    checks = [checker(part) for part in parts]

    def check(value: Any) -> Fault | None:
        faults = []
        for one in checks:
            fault = one(value)
            if fault is None:
                return None
            faults.append(fault)
        return next((fault for fault in faults if fault.of_kind), _refusal(form, value))

    return check


def _items_check(form: Any, item_form: Any) -> Check:
    inner = checker(item_form)

    def check(value: Any) -> Fault | None:
        if not isinstance(value, (list, tuple)):
            return _refusal(form, value)
        return first_fault(value, inner)

    return check


def _tuple_check(form: Any, parts: Sequence[Any]) -> Check:
    checks = [checker(part) for part in parts]

    def check(value: Any) -> Fault | None:
        if not isinstance(value, (list, tuple)):
            return _refusal(form, value)
        if len(value) != len(checks):
            return Fault("", f"must hold {len(checks)} values, got {shown(value)}")
        for number, (inner, item) in enumerate(zip(checks, value, strict=True)):
            fault = inner(item)
            if fault is not None:
                return fault.inside(str(number))
        return None

    return check


def _entries_check(form: Any, key_form: Any, value_form: Any) -> Check:
    check_key = checker(key_form)
    check_value = checker(value_form)

    def check(value: Any) -> Fault | None:
        if not isinstance(value, dict):
            return _refusal(form, value)
        for key, item in value.items():
            wrong = check_key(key)
            if wrong is not None:
                return Fault("", f"has the key {shown(key)}, which {wrong.words}")
            fault = check_value(item)
            if fault is not None:
                return fault.inside(str(key))
        return None

    return check


def _fields_check(form: Any) -> Check:
    checks = {
        name: checker(part) for name, part in get_type_hints(form, include_extras=True).items()
    }
    required = sorted(form.__required_keys__, key=list(checks).index)

    def check(value: Any) -> Fault | None:
        if not isinstance(value, dict):
            return _refusal(form, value)
        for name in required:
            if name not in value:
                return Fault(name, "is missing")
        for name, item in value.items():
            fault = checks[name](item) if name in checks else None
            if fault is not None:
                return fault.inside(name)
        return None

    return check
