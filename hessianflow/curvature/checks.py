"""Argument checks that the eigensolvers share with the probe, which makes them before a run."""

from typing import get_args

from hessianflow.checks import check_choice, check_count
from hessianflow.curvature.results import Which
from hessianflow.interfaces import HessianFlowError


def check_search(k: int, which: Which, tol: float, max_matvecs: int | None) -> None:
    """Raise HessianFlowError if an argument of a search for eigenpairs is out of range."""
    check_count("k", k)
    check_choice("which", which, get_args(Which))
    if not tol > 0:
        raise HessianFlowError(f"tol must be positive, got {tol}")
    # "not at least" rather than "below" refuses nan, with which the search would never end.
    if max_matvecs is not None and not max_matvecs >= 1:
        raise HessianFlowError(f"max_matvecs must be at least 1 or None, got {max_matvecs}")


def check_probe(cold_every: int, first_matvecs: int | None, budget: float | None) -> None:
    """Refuse options of a probe that are out of range.

    Raises:
        HessianFlowError: one is.
    """
    check_count("cold_every", cold_every)
    if first_matvecs is not None and first_matvecs < 0:
        raise HessianFlowError(
            "first_matvecs must be at least 0, or None for no bound of its own, got"
            f" {first_matvecs}"
        )
    if budget is not None and not budget > 0:
        raise HessianFlowError(
            f"budget must be a positive share of the training cost, e.g. 0.01, got {budget}"
        )
