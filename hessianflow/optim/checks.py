"""Argument checks shared by the optimizers: each names the parameter, the value received and the
bound."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.interfaces import HessianFlowError


class CheckedOptimizer(Optimizer):
    """An optimizer that keeps no parameter group which its `_check` refuses."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options, checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except HessianFlowError:
            self.param_groups.pop()
            raise

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise a HessianFlowError for an option out of its bounds."""


def check_number(name: str, value: float, *, low: float = 0.0, below: float = math.inf) -> None:
    """Refuse whatever is not a finite number in [low, below).

    Raises:
        HessianFlowError: it is not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value < below
    ):
        bound = f" and < {below:g}" if below < math.inf else ""
        raise HessianFlowError(f"{name} must be a finite number >= {low:g}{bound}, got {value!r}")


def check_flags(group: dict[str, Any], *names: str) -> None:
    """Refuse options that are neither True nor False: any text would count as True.

    Raises:
        HessianFlowError: one of them is something else.
    """
    for name in names:
        if not isinstance(group[name], bool):
            raise HessianFlowError(f"{name} must be True or False, got {group[name]!r}")


def check_count(name: str, value: int, low: int = 1) -> None:
    """Refuse whatever is not a whole number >= `low`.

    Raises:
        HessianFlowError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise HessianFlowError(f"{name} must be a whole number >= {low}, got {value!r}")


def check_limit(name: str, value: float | None, none: str) -> None:
    """Refuse a limit that is neither None, which means `none`, nor a finite number > 0.

    Raises:
        HessianFlowError: it is neither.
    """
    if value is not None:
        check_number(name, value)
    if value == 0:
        raise HessianFlowError(f"{name} must be > 0, got 0: use None for {none}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name that is not among `choices`.

    Raises:
        HessianFlowError: it is not.
    """
    if value not in choices:
        raise HessianFlowError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_rate(lr: float | Tensor, capturable: bool) -> None:
    """Refuse a learning rate that is negative, not finite, or a tensor with dimensions or without
    `capturable`.

    Raises:
        HessianFlowError: it is one of these.
    """
    if isinstance(lr, Tensor) and not capturable:
        raise HessianFlowError(f"lr as a tensor needs capturable=True, got {lr!r}: use a number")
    if isinstance(lr, Tensor) and lr.ndim > 0:
        raise HessianFlowError(
            f"lr as a tensor must be 0-dim, got shape {[*lr.shape]}: use lr.squeeze() for one value"
        )
    check_number("lr", lr.item() if isinstance(lr, Tensor) else lr)


def check_parameters(params: Sequence[Tensor], optimizer: str) -> None:
    """Refuse an empty group and parameters without a real norm.

    Raises:
        HessianFlowError: no parameter, or one that is complex or sparse.
    """
    if not params:
        raise HessianFlowError(
            f"{optimizer} must get at least one parameter in each group, got an empty list"
        )
    for index, parameter in enumerate(params):
        if parameter.is_complex() or parameter.layout != torch.strided:
            kind = "complex" if parameter.is_complex() else str(parameter.layout)
            raise HessianFlowError(
                f"{optimizer} needs real dense parameters, but number {index} is {kind}"
            )
