"""Check a saved optimizer state against the optimizer that is to take it.

torch takes any state, and then fails at the next step or continues without some options.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.schema import shown
from hessianflow.runs.states import DamagedStateError

_LIKE_WEIGHTS = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg"),
    *("grad_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
)
"""Entries that the optimizers of torch and of this package keep in the shape of the weights."""


class OtherGroupsError(HessianFlowError):
    """Error for a checkpoint whose optimizer has its weights in other parameter groups."""


def check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse saved options of the wrong kind, and entries for a weight in the wrong shape.

    The optimizer would take them, and fail at a step.

    Raises:
        DamagedStateError: An entry is wrong; the message names it.
    """
    for number, (own, group) in enumerate(
        zip(optimizer.param_groups, saved["param_groups"], strict=False)
    ):
        for name in (own.keys() & group.keys()) - {"params"}:
            if not _is_alike(own[name], group[name]):
                raise DamagedStateError(
                    f"optimizer.param_groups.{number}.{name} cannot be {shown(group[name])}"
                )
    if not type(optimizer).__module__.startswith(
        ("torch.optim.", "hessianflow.optim.", "hessianflow.adversarial.")
    ):
        return  # a foreign optimizer may keep anything under these names
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in _numbers(group)]
    shapes = dict(zip(numbers, (weight.shape for weight in weights), strict=False))
    # Groups that were added during the run are not here yet.
    further = saved["param_groups"][len(optimizer.param_groups) :]
    added = {number for group in further for number in _numbers(group)}
    for number, kept in saved["state"].items():
        if number in added:
            continue
        if number not in shapes or not isinstance(kept, dict):
            raise DamagedStateError(f"optimizer.state.{shown(number)} belongs to no weight")
        for name, value in kept.items():
            fits = not isinstance(value, Tensor) or value.ndim == 0 or value.shape == shapes[number]
            if name in _LIKE_WEIGHTS and not (
                fits and (value is None or isinstance(value, Tensor))
            ):
                raise DamagedStateError(
                    f"optimizer.state.{number}.{name} must be a tensor of the shape"
                    f" {list(shapes[number])} of its weight, got {shown(value)}"
                )
            if name == "step" and not isinstance(value, (Tensor, int, float)):
                raise DamagedStateError(
                    f"optimizer.state.{number}.step must be a number, got {shown(value)}"
                )


def in_order(
    saved: Mapping[str, Any], named: Sequence[Sequence[str]], own: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return the saved state of an optimizer with its weights in the order of another optimizer.

    torch pairs weights by position alone: where shapes agree, a state saved for [weight, bias]
    would silently be used for [bias, weight]. Names are given by group for the saved weights,
    empty for one without a name, and for the `own` ones, which may lack groups at the end.

    Raises:
        OtherGroupsError: A weight is in another group, or in none.
    """
    groups = list(saved["param_groups"])
    for number, (before, now) in enumerate(zip(named, own, strict=False)):
        if number >= len(groups) or len(_numbers(groups[number])) != len(before):
            break  # damaged, which other checks report
        if list(before) == list(now):
            continue
        moved = sorted({*before} ^ {*now}) or [
            name for name in now if before.count(name) != now.count(name)
        ]
        if moved:
            there = [index for index, names in enumerate(named) if moved[0] in names]
            here = [index for index, names in enumerate(own) if moved[0] in names]
            saved_in = f"in its parameter group {there[0]}" if there else "in no parameter group"
            held_in = f"in group {here[0]}" if here else "in none"
            raise OtherGroupsError(
                f"{moved[0] or 'a parameter'!r} is {saved_in}, and {held_in} of this run"
            )
        by_name: dict[str, list[Any]] = {}
        for name, weight in zip(before, _numbers(groups[number]), strict=True):
            by_name.setdefault(name, []).append(weight)
        groups[number] = {**groups[number], "params": [by_name[name].pop(0) for name in now]}
    return {**saved, "param_groups": groups}


@contextmanager
def keeping_options(optimizer: Optimizer) -> Iterator[None]:
    """Refuse a saved state, loaded within the context, that drops an option of the optimizer.

    Raises:
        DamagedStateError: The state lacks an option that torch does not fill in.
    """
    before = [set(group) for group in optimizer.param_groups]
    yield
    for number, (names, group) in enumerate(zip(before, optimizer.param_groups, strict=False)):
        lost = sorted(names - group.keys())
        if lost:
            raise DamagedStateError(f"optimizer.param_groups.{number}.{lost[0]} is missing")


def _is_alike(own: Any, saved: Any) -> bool:
    """Return whether a saved option has the type of the own option, and is finite if a number."""
    if isinstance(own, Tensor) or isinstance(saved, Tensor):
        return isinstance(own, (Tensor, float, int)) and isinstance(saved, (Tensor, float, int))
    if isinstance(own, (list, tuple)):
        same = isinstance(saved, (list, tuple)) and len(saved) == len(own)
        return same and all(map(_is_alike, own, saved))
    if type(own) in (int, float):
        return type(saved) in (int, float) and math.isfinite(saved)
    return own is None or saved is None or isinstance(saved, type(own))


def _numbers(group: Mapping[str, Any]) -> Sequence[Any]:
    """Return the numbers of a group's weights; an empty sequence if they are no list."""
    numbers = group.get("params")
    return numbers if isinstance(numbers, list) else ()
