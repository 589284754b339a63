"""Argument checks that the eigensolvers share with the probe, which makes them before a run."""

from numbers import Integral
from typing import get_args

from hessianflow.curvature.results import Which
from hessianflow.interfaces import HessianFlowError


def check_count(name: str, value: object, minimum: int = 1, remark: str = "") -> None:
    """Refuse a value that is not a whole number >= `minimum`; `remark` explains the minimum.

    Raises:
        HessianFlowError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise HessianFlowError(f"{name} must be a whole number >= {minimum}{remark}, got {value!r}")


def check_search(k: int, which: Which, tol: float, max_matvecs: int | None) -> None:
    """Refuse a search for eigenpairs that no operator could satisfy.

    Raises:
        HessianFlowError: an argument is out of range.
    """
    check_count("k", k)
    if which not in get_args(Which):
        raise HessianFlowError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    if not tol > 0:
        raise HessianFlowError(f"tol must be positive, got {tol}")
    # "not at least" rather than "below" refuses nan, with which the search would never end.
    if max_matvecs is not None and not max_matvecs >= 1:
        raise HessianFlowError(f"max_matvecs must be at least 1 or None, got {max_matvecs}")
