"""Observation of a user's own loss while it runs, which shows the divisor of its mean."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hessianflow.losses.weights import (
    CLASS_FUNCTIONS,
    ELEMENTWISE_FUNCTIONS,
    IGNORE_INDEX,
    Weight,
    as_weight,
    class_weight,
    exact_type,
)

_LOSSES = frozenset((*CLASS_FUNCTIONS, *ELEMENTWISE_FUNCTIONS))
_MEANS = frozenset((torch.mean, Tensor.mean))
_SUMS = frozenset((torch.sum, Tensor.sum))
_DIVISIONS = frozenset((torch.div, Tensor.div, torch.true_divide, Tensor.true_divide))
_CLAMPS = frozenset(
    (
        *(torch.clamp, torch.clamp_min, torch.maximum, torch.max),
        *(Tensor.clamp, Tensor.clamp_min, Tensor.maximum, Tensor.max),
    )
)
_SCALARS = _MEANS | _SUMS | _DIVISIONS | _CLAMPS

COUNT = "the count it divides by"


@dataclass(frozen=True)
class Call:
    """An observed call of a function of torch."""

    function: Callable[..., Any]
    arguments: dict[str, Any]  # those that were passed, by name
    result: Tensor

    @property
    def is_loss(self) -> bool:
        """Return whether the function is one of torch's losses."""
        return self.function in _LOSSES

    @property
    def reduction(self) -> str:
        """Return the reduction of a loss."""
        return str(self.arguments.get("reduction", "mean"))

    @property
    def ignore_index(self) -> int | None:
        """Return the class index of targets that do not count; None if a loss has none."""
        if self.function not in CLASS_FUNCTIONS or self.arguments["target"].is_floating_point():
            return None
        index: int = self.arguments.get("ignore_index", IGNORE_INDEX)
        return index

    def divisor(self) -> Weight:
        """Return the divisor of the mean of a loss."""
        inputs: Tensor = self.arguments["input"]
        targets: Tensor = self.arguments["target"]
        weight: Tensor | None = self.arguments.get("weight")
        if self.function in CLASS_FUNCTIONS:
            if not targets.is_floating_point():
                ignored = self.arguments.get("ignore_index", IGNORE_INDEX)
                return class_weight(targets, weight, ignored)
            # With probabilities as targets, every entry outside the class dimension counts as one.
            return inputs.numel() // inputs.shape[min(1, inputs.ndim - 1)]
        if weight is not None and self.function is functional.mse_loss:
            total: Tensor = weight.expand_as(inputs).sum(dtype=exact_type(inputs.device))
            return total
        return (inputs.detach() + targets.detach()).numel()


class Observer(TorchFunctionMode):
    """A mode that records the calls of torch's losses, sums, means and divisions."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():  # The compiler also traces this method.
            return result
        # Only plain tensors count: a compiler that traces calls with stand-ins without numbers.
        if type(result) is Tensor and (func in _LOSSES or (func in _SCALARS and result.ndim == 0)):
            arguments = dict(zip(_names(func), args, strict=False)) | kwargs
            self._calls.append(Call(func, arguments, result))
        return result

    @property
    def ignore_index(self) -> int | None:
        """Return the class index of targets that do not count in the loss that was called last."""
        losses = [call for call in self._calls if call.is_loss]
        if not losses:
            return None
        return losses[-1].ignore_index

    @property
    def classified(self) -> tuple[Tensor, Tensor] | None:
        """Return detached scores and class indices, if exactly one class loss was called."""
        calls = [call for call in self._calls if call.ignore_index is not None]
        if len(calls) != 1:
            return None
        scores: Tensor = calls[0].arguments["input"]
        return scores.detach(), calls[0].arguments["target"]

    def is_sum(self, loss: Tensor) -> bool:
        """Return whether the loss is the result of one of torch's with reduction="sum"."""
        last = self._returned(loss)
        return last is not None and last.is_loss and last.reduction == "sum"

    def divisor(self, loss: Tensor) -> tuple[Weight, str] | None:
        """Return the divisor of a scalar loss and its source; None if the calls do not show it."""
        last = self._returned(loss)
        if last is not None and last.function in _MEANS:
            return last.arguments["input"].numel(), "the values of its mean"
        if last is not None and self._divides_a_sum(last):
            return as_weight(self._count(last.arguments["other"])), COUNT
        means = [call for call in self._calls if call.is_loss and call.reduction == "mean"]
        if last in means:
            means = [call for call in means if call is last]
        if len(means) == 1:
            return means[0].divisor(), f"what {means[0].function.__name__} divides by"
        return None

    def _returned(self, loss: Tensor) -> Call | None:
        return next((call for call in reversed(self._calls) if call.result is loss), None)

    def _count(self, divisor: Tensor) -> Tensor:
        """Return a count before it was clamped away from 0: where it is 0, no target counts."""
        for call in self._calls:
            before = call.arguments.get("input")
            is_clamped = call.result is divisor and call.function in _CLAMPS
            if is_clamped and isinstance(before, Tensor) and before.ndim == 0:
                return torch.where(before == 0, 0, divisor)
        return divisor

    def _divides_a_sum(self, call: Call) -> bool:
        if call.function not in _DIVISIONS:
            return False
        count = call.arguments["other"]
        if not isinstance(count, Tensor) or count.ndim > 0 or count.requires_grad:
            return False
        total = call.arguments["input"]
        return any(one.result is total and one.function in _SUMS for one in self._calls)


@cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    if function in _LOSSES:
        return tuple(signature(function).parameters)
    return ("input", "other")
