"""Observes a user's own loss while it runs, and tells from the calls inside what its mean divides
by."""

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
        torch.clamp,
        torch.clamp_min,
        torch.maximum,
        Tensor.clamp,
        Tensor.clamp_min,
        Tensor.maximum,
        torch.max,
        Tensor.max,
    )
)
COUNT = "the count it divides by"

_SCALARS = _MEANS | _SUMS | _DIVISIONS | _CLAMPS


@dataclass(frozen=True)
class Call:
    """One call that was observed.

    Attributes:
        function: of torch.
        arguments: by name, as far as they were given.
        result: what it returned.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Tensor

    @property
    def is_loss(self) -> bool:
        """Whether the function is one of torch's losses."""
        return self.function in _LOSSES

    @property
    def reduction(self) -> str:
        """How a loss was reduced."""
        name: str = self.arguments.get("reduction", "mean")
        return name

    @property
    def ignore_index(self) -> int | None:
        """The class index of targets that do not count; None for a loss that has none."""
        if self.function not in CLASS_FUNCTIONS or self.arguments["target"].is_floating_point():
            return None
        index: int = self.arguments.get("ignore_index", IGNORE_INDEX)
        return index

    def divisor(self) -> Weight:
        """Return what the mean of a loss divides by."""
        inputs: Tensor = self.arguments["input"]
        targets: Tensor = self.arguments["target"]
        weight: Tensor | None = self.arguments.get("weight")
        if self.function in CLASS_FUNCTIONS:
            if not targets.is_floating_point():
                return class_weight(
                    targets, weight, self.arguments.get("ignore_index", IGNORE_INDEX)
                )
            # Probabilities: one target for each place outside of the dimension of the classes.
            return inputs.numel() // inputs.shape[min(1, inputs.ndim - 1)]
        if weight is not None and self.function is functional.mse_loss:
            total: Tensor = weight.expand_as(inputs).sum(dtype=exact_type(inputs.device))
            return total
        return (inputs.detach() + targets.detach()).numel()


class Observer(TorchFunctionMode):
    """Remembers the calls of torch's losses, sums, means and divisions that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call, and remember it if it is of interest."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Exactly a tensor: while a compiler traces, it calls with stand-ins that hold no numbers.
        if type(result) is Tensor and (func in _LOSSES or (func in _SCALARS and result.ndim == 0)):
            self._calls.append(Call(func, _by_name(func, args, kwargs), result))
        return result

    @property
    def ignore_index(self) -> int | None:
        """The class index of targets that do not count, of the last loss that was called."""
        indices = [call.ignore_index for call in self._calls if call.is_loss]
        return indices[-1] if indices else None

    def is_sum(self, loss: Tensor) -> bool:
        """Return whether a loss is what one of torch's losses returned under reduction="sum"."""
        last = self._returned(loss)
        return last is not None and last.is_loss and last.reduction == "sum"

    def divisor(self, loss: Tensor) -> tuple[Weight, str] | None:
        """Return what a scalar loss divides by, and how that is known; None where the calls do not
        tell."""
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
        """Return a count as it was before it was clamped away from 0, so that 0 still means that
        nothing counts."""
        for call in self._calls:
            before = call.arguments.get("input")
            if (
                call.result is divisor
                and call.function in _CLAMPS
                and isinstance(before, Tensor)
                and before.ndim == 0
            ):
                return torch.where(before == 0, 0, divisor)
        return divisor

    def _divides_a_sum(self, call: Call) -> bool:
        if call.function not in _DIVISIONS:
            return False
        count = call.arguments["other"]
        if not isinstance(count, Tensor) or count.ndim > 0 or count.requires_grad:
            return False
        top = call.arguments["input"]
        return any(sum_.result is top and sum_.function in _SUMS for sum_ in self._calls)


@cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(function).parameters) if function in _LOSSES else ("input", "other")


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return {**dict(zip(_names(function), args, strict=False)), **kwargs}
