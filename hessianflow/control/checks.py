"""Checks of arguments, which raise a HessianFlowError.

The message names the parameter, its bound and the value received.
"""

from collections.abc import Mapping

from hessianflow.checks import check_count, check_number
from hessianflow.interfaces.errors import HessianFlowError


def check_optional_count(name: str, value: int | None) -> int | None:
    """Return `value` if it is None or a whole number >= 1."""
    if value is not None:
        check_count(name, value)
    return value


def check_optional_number(name: str, value: float | None, **bounds: float) -> float | None:
    """Return `value` if it is None or within the bounds of :func:`check_number`."""
    if value is not None:
        check_number(name, value, **bounds)
    return value


def check_cap(batch_size: int, max_batch_size: int) -> int:
    """Return `max_batch_size` if it is a cap that a first batch of `batch_size` may have."""
    check_count("max_batch_size", max_batch_size)
    if max_batch_size < batch_size:
        raise HessianFlowError(
            f"max_batch_size must be >= batch_size {batch_size}, got {max_batch_size}: raise it or"
            " start smaller"
        )
    return max_batch_size


def check_fits(max_batch_size: int, examples_per_epoch: int) -> None:
    """Refuse a cap that the training set cannot fill."""
    if max_batch_size > examples_per_epoch:
        raise HessianFlowError(
            f"max_batch_size must be <= the {examples_per_epoch} training examples, got"
            f" {max_batch_size}: lower it"
        )


def require_signals(names: frozenset[str], signals: Mapping[str, float]) -> None:
    """Refuse an update that lacks signals the controller asked for."""
    missing = sorted(names - signals.keys())
    if missing:
        raise HessianFlowError(
            f"signals must hold {', '.join(missing)}, got {sorted(signals) or 'none'}: pass them to"
            " update(progress, reading, signals), or attach the GradientObserver that measures"
            " them (hf.optim.GradientMoments)"
        )
