"""Argument checks for every room: each names the argument, what it may be and what it was."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

from hessianflow.interfaces import HessianFlowError


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a name that is not among `choices`.

    Raises:
        HessianFlowError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise HessianFlowError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, low: int = 1, none: str = "") -> None:
    """Refuse what is not a whole number >= `low`.

    Args:
        name: of the argument.
        value: NumPy's whole numbers are some, too; True and False are not.
        low: the smallest that is allowed.
        none: what None means, where it is allowed.

    Raises:
        HessianFlowError: it is not.
    """
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        way_out = f": use None for {none}" if none else ""
        raise HessianFlowError(f"{name} must be a whole number >= {low}, got {value!r}{way_out}")


def check_limit(name: str, value: object, none: str, above: float = 0) -> None:
    """Refuse what is neither None, which means `none`, nor a finite number > `above`.

    Raises:
        HessianFlowError: it is neither.
    """
    if value is None:
        return
    if not is_number(value) or not above < float(value) < math.inf:  # type: ignore[arg-type]
        raise HessianFlowError(f"{name} must be a finite number > {above:g}, got {value!r}: use None for {none}")


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called.

    Raises:
        HessianFlowError: with its type.
    """
    if not callable(value):
        raise HessianFlowError(f"{name} must be a function, got a {type(value).__name__}")


def is_number(value: object) -> bool:
    """Return whether a value is a real number: nan and infinities are, True, False and text are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_home(path: str | Path, where: str = "") -> Path:
    """Return the path with the home folder in place of a leading `~` or `~NAME`; only this function
    expands one.

    Args:
        path: as somebody wrote it.
        where: what it was given as, for errors.

    Raises:
        HessianFlowError: it is no path, there is no such home folder, or it holds a zero byte.
    """
    name = f"{where} {path}".strip()
    try:
        found = Path(path).expanduser()
    except TypeError:
        raise HessianFlowError(f"{where or 'a path'} must be text or a Path, got {path!r}") from None
    except RuntimeError:
        raise HessianFlowError(f"{name}: no home folder is known; write the path out, or ./{path}") from None
    if "\0" in str(found):
        raise HessianFlowError(f"{name!r} holds a zero byte, which no path can: remove it")
    return found
