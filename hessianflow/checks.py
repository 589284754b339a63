"""Argument checks for the whole package: each names the argument, what it may be and what it
was."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

from hessianflow.interfaces.errors import HessianFlowError


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not among `choices`.

    Raises:
        HessianFlowError: naming the argument, the choices and the value.
    """
    if not isinstance(value, str) or value not in choices:
        raise HessianFlowError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, low: int = 1, none: str = "") -> None:
    """Refuse a value that is not a whole number >= `low`.

    Args:
        name: the name of the argument.
        value: the value; NumPy's whole numbers pass, True and False do not.
        low: the smallest value allowed.
        none: what None means; empty where None is not allowed.

    Raises:
        HessianFlowError: naming the argument, the bound and the value.
    """
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        way_out = f": use None for {none}" if none else ""
        raise HessianFlowError(f"{name} must be a whole number >= {low}, got {value!r}{way_out}")


def check_limit(name: str, value: object, none: str, above: float = 0) -> None:
    """Refuse a value that is neither None, which means `none`, nor a finite number > `above`.

    Raises:
        HessianFlowError: naming the argument, the bound and the value.
    """
    if value is None:
        return
    if not is_number(value) or not above < float(value) < math.inf:  # type: ignore[arg-type]
        raise HessianFlowError(
            f"{name} must be a finite number > {above:g}, got {value!r}: use None for {none}"
        )


def check_callable(name: str, value: object) -> None:
    """Refuse a value that cannot be called.

    Raises:
        HessianFlowError: naming its type.
    """
    if not callable(value):
        raise HessianFlowError(f"{name} must be a function, got a {type(value).__name__}")


def is_number(value: object) -> bool:
    """Return whether a value is a real number: nan and infinities are, True, False and text are
    not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_home(path: str | Path, where: str = "") -> Path:
    """Return the path with the home folder in place of a leading `~` or `~NAME`; only this function
    expands one.

    Args:
        path: the path as the user wrote it.
        where: the option or argument it was given as, for errors.

    Raises:
        HessianFlowError: the value is not a path, there is no such home folder, or the path holds a
            zero byte.
    """
    name = f"{where} {path}".strip()
    try:
        found = Path(path).expanduser()
    except TypeError:
        raise HessianFlowError(
            f"{where or 'a path'} must be text or a Path, got {path!r}"
        ) from None
    except RuntimeError:
        raise HessianFlowError(
            f"{name}: no home folder is known; write the path out, or ./{path}"
        ) from None
    if "\0" in str(found):
        raise HessianFlowError(f"{name!r} holds a zero byte, which no path can: remove it")
    return found
