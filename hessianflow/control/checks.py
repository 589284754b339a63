"""Argument checks shared by the controllers: each names the parameter, the value received and the
bound."""

import math
from collections.abc import Mapping

from hessianflow.interfaces.errors import HessianFlowError


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """`value` as given, if it is a whole number >= `minimum`.

    Raises:
        HessianFlowError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise HessianFlowError(f"{name} must be a whole number >= {minimum}, got {value!r}")
    return value


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """`value` as given, if it is finite, > `above` (when given) and within [low, high].

    Raises:
        HessianFlowError: it is not.
    """
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    if not finite or not low <= value <= high or (above is not None and value <= above):
        bounds = [f" > {above:g}"] if above is not None else []
        bounds += [f" >= {low:g}"] if low > -math.inf else []
        bounds += [f" <= {high:g}"] if high < math.inf else []
        raise HessianFlowError(
            f"{name} must be a finite number{' and'.join(bounds)}, got {value!r}"
        )
    return value


def check_cap(batch_size: int, max_batch_size: int) -> int:
    """`max_batch_size` as given, if a batch may start at `batch_size` under it.

    Raises:
        HessianFlowError: it is not a whole number, or lies below `batch_size`.
    """
    check_count("max_batch_size", max_batch_size)
    if max_batch_size < batch_size:
        raise HessianFlowError(
            f"max_batch_size must be >= batch_size {batch_size}, got {max_batch_size}: raise it or"
            " start smaller"
        )
    return max_batch_size


def check_fits(max_batch_size: int, examples_per_epoch: int) -> None:
    """Refuse a cap that the training set cannot fill.

    Raises:
        HessianFlowError: more examples in the largest batch than in the training set.
    """
    if max_batch_size > examples_per_epoch:
        raise HessianFlowError(
            f"max_batch_size must be <= the {examples_per_epoch} training examples, got"
            f" {max_batch_size}: lower it"
        )


def check_signals(names: frozenset[str], signals: Mapping[str, float]) -> None:
    """Refuse an update without the signals a controller asked for.

    Raises:
        HessianFlowError: a name is not among `signals`.
    """
    missing = sorted(names - signals.keys())
    if missing:
        raise HessianFlowError(
            f"signals must hold {', '.join(missing)}, got {sorted(signals) or 'none'}: pass them to"
            " update(progress, reading, signals), or attach the GradientObserver that measures"
            " them (hf.optim.GradientMoments)"
        )
