"""Argument checks of the optimizers; each error names the parameter, its value and its bound."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessianflow.checks import check_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.copying import CopyableOptimizer
from hessianflow.sharding import is_shard


class CheckedOptimizer(CopyableOptimizer):
    """An optimizer that checks the options of every parameter group before it keeps the group."""

    _flags: tuple[str, ...] = ("adapt_vectors", "decay_vectors", "capturable")
    """Options that must be True or False."""
    _amounts: tuple[str, ...] = ("eps", "weight_decay")
    """Options that must be finite numbers >= 0."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options, checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except HessianFlowError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Raise a HessianFlowError for an option out of its bounds."""
        check_parameters(group["params"], type(self).__name__)
        check_flags(group, *self._flags)
        check_rate(group["lr"], group["capturable"])
        for name in self._amounts:
            check_number(name, group[name])


def check_flags(group: dict[str, Any], *names: str) -> None:
    """Refuse options that are neither True nor False, since any text would count as True.

    Raises:
        HessianFlowError: An option is something else.
    """
    for name in names:
        if not isinstance(group[name], bool):
            raise HessianFlowError(f"{name} must be True or False, got {group[name]!r}")


def check_betas(betas: Any) -> None:
    """Refuse anything but two numbers in [0, 1).

    Raises:
        HessianFlowError: The value is something else.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise HessianFlowError(f"betas must be two numbers such as (0.9, 0.999), got {betas!r}")
    for beta in betas:
        check_number("betas", beta, below=1)


def check_rate(lr: float | Tensor, capturable: bool) -> None:
    """Refuse a learning rate that is negative or not finite, or a tensor that cannot be used.

    Raises:
        HessianFlowError: The rate is negative or not finite, or a tensor with dimensions or
            without `capturable`.
    """
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
        return
    if not capturable:
        raise HessianFlowError(f"lr as a tensor needs capturable=True, got {lr!r}: use a number")
    if lr.ndim > 0:
        raise HessianFlowError(
            f"lr as a tensor must be 0-dim, got shape {[*lr.shape]}: use lr.squeeze() for one value"
        )
    check_number("lr", lr.item())


def check_parameters(params: Sequence[Tensor], optimizer: str) -> None:
    """Refuse an empty group and parameters without a real norm.

    Raises:
        HessianFlowError: There is no parameter, or one is complex or sparse.
    """
    if not params:
        raise HessianFlowError(
            f"{optimizer} must get at least one parameter in each group, got an empty list"
        )
    for index, parameter in enumerate(params):
        if is_shard(parameter):
            raise HessianFlowError(
                f"{optimizer} needs whole parameters, but number {index} is a DTensor (FSDP or"
                " tensor parallelism), of which this process holds a piece: use an optimizer of"
                " torch, or DistributedDataParallel"
            )
        if parameter.is_complex() or parameter.layout != torch.strided:
            kind = "complex" if parameter.is_complex() else str(parameter.layout)
            raise HessianFlowError(
                f"{optimizer} needs real dense parameters, but number {index} is {kind}"
            )
