"""Argument checks whose errors name the argument, the allowed values and the value."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

from hessianflow.interfaces.errors import HessianFlowError

T = TypeVar("T")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not among `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise HessianFlowError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: T, low: int = 1, none: str = "") -> T:
    """Return the value if it is a whole number >= `low`; NumPy's pass, True and False do not.

    If `none` is not empty, None is allowed, and `none` says what it means.
    """
    if none and value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        way_out = ""
        if none:
            way_out = f": use None for {none}"
        raise HessianFlowError(f"{name} must be a whole number >= {low}, got {value!r}{way_out}")
    return value


def check_number(
    name: str,
    value: float,
    *,
    low: float = 0.0,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return the value if it is finite and >= `low`, > `above`, <= `high` and < `below`.

    Raises:
        HessianFlowError: the value is no such number.
    """
    if is_number(value) and math.isfinite(value) and low <= value <= high and above < value < below:
        return value
    bounds = [f" >= {low:g}", f" <= {high:g}", f" < {below:g}"]
    if above >= low:
        bounds[0] = f" > {above:g}"
    stated = " and".join(bound for bound in bounds if "inf" not in bound)
    raise HessianFlowError(f"{name} must be a finite number{stated}, got {value!r}")


def check_limit(name: str, value: object, none: str, above: float = 0) -> None:
    """Refuse a value that is neither None, which means `none`, nor a finite number > `above`."""
    if value is None:
        return
    if not is_number(value) or not above < float(value) < math.inf:  # type: ignore[arg-type]
        raise HessianFlowError(
            f"{name} must be a finite number > {above:g}, got {value!r}: use None for {none}"
        )


def check_callable(name: str, value: object) -> None:
    """Refuse a value that cannot be called."""
    if not callable(value):
        raise HessianFlowError(f"{name} must be a function, got a {type(value).__name__}")


def is_number(value: object) -> bool:
    """Return whether a value is a real number, as nan and infinity are; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_home(path: str | Path, where: str = "") -> Path:
    """Return the path with the home folder in place of a leading `~` or `~NAME`.

    The package expands no path elsewhere. Errors begin with `where`, the option or argument.

    Raises:
        HessianFlowError: the value is not a path, there is no such home folder, or the path holds a
            zero byte.
    """
    name = f"{where} {path}".strip()
    try:
        expanded = Path(path).expanduser()
    except TypeError:
        raise HessianFlowError(
            f"{where or 'a path'} must be text or a Path, got {path!r}"
        ) from None
    except RuntimeError:
        raise HessianFlowError(
            f"{name}: no home folder is known; write the path out, or ./{path}"
        ) from None
    if "\0" in str(expanded):
        raise HessianFlowError(f"{name!r} holds a zero byte, which no path can: remove it")
    return expanded
