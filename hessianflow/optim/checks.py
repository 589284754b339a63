"""Argument checks shared by the optimizers: each names the parameter, the value received and the bound."""

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
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value < below:
        bound = f" and < {below:g}" if below < math.inf else ""
        raise HessianFlowError(f"{name} must be a finite number >= {low:g}{bound}, got {value!r}")


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
    """Refuse a learning rate that is negative, not finite, or a tensor without `capturable`.

    Raises:
        HessianFlowError: it is one of these.
    """
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    elif not capturable or lr.numel() != 1:
        raise HessianFlowError(f"lr as a tensor must hold one value and needs capturable=True, got shape {[*lr.shape]}")


def check_parameters(params: Sequence[Tensor], optimizer: str) -> None:
    """Refuse an empty group and parameters without a real norm.

    Raises:
        HessianFlowError: no parameter, or one that is complex or sparse.
    """
    if not params:
        raise HessianFlowError(f"{optimizer} must get at least one parameter in each group, got an empty list")
    for index, parameter in enumerate(params):
        if parameter.is_complex() or parameter.layout != torch.strided:
            kind = "complex" if parameter.is_complex() else str(parameter.layout)
            raise HessianFlowError(f"{optimizer} needs real dense parameters, but number {index} is {kind}")
