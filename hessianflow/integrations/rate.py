"""A factor of the learning rate that is in force only during a step of the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer


class RateFactor:
    """Multiplies the rates in the groups of an optimizer by a factor during each of its steps.

    Between steps, every group holds the rate that the schedule set, so schedules of any kind
    continue undisturbed. The factor works through the optimizer's own hooks, wherever the host
    calls `step`.

    Args:
        optimizer: The optimizer, without the wrapper of a host.

    Attributes:
        factor: The factor, 1 at the start.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.factor = 1.0
        self._optimizer = optimizer
        self._held: list[tuple[dict[str, Any], float]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._multiply()),
            optimizer.register_step_post_hook(lambda *_: self._restore()),
        ]

    @property
    def value(self) -> float:
        """Return the rate of the first group times the factor, as the next step uses it."""
        return float(self._optimizer.param_groups[0]["lr"]) * self.factor

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Hold the multiplied rates in the groups while active, for a measurement."""
        self._multiply()
        try:
            yield
        finally:
            self._restore()

    def remove(self) -> None:
        """Remove the hooks: later steps use the rates as they are."""
        self._restore()
        for hook in self._hooks:
            hook.remove()

    def _multiply(self) -> None:
        self._restore()  # a step that raised an error left multiplied rates
        if self.factor == 1:
            return
        seen: set[int] = set()
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):
                if id(rate) in seen:  # torch shares the constructor's tensor among all groups
                    continue
                seen.add(id(rate))
            self._held.append((group, float(rate)))
            _set(group, float(rate) * self.factor)

    def _restore(self) -> None:
        for group, rate in self._held:
            _set(group, rate)
        self._held.clear()


def bare(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside the wrappers of hosts."""
    while True:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return optimizer  # type: ignore[no-any-return]
        optimizer = inner


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
