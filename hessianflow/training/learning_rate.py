"""The learning rate of a run: the user's schedule times the controller's factor."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.interfaces import HessianFlowError
from hessianflow.training.schedule import ScheduleUnit, SteppedSchedule

SET_BY_HAND = (
    "a learning rate was set by hand: it is taken as stated at the reference batch size, and"
    " trained with times the controller's factor"
)
"""Notice of a rate set by hand while the factor is not 1."""


class LearningRate:
    """Multiplies the rates in the optimizer's groups by a factor, for as long as a step takes.

    Between steps every group holds its rate without the factor, as stated at the reference batch
    size. A rate set at any time (by a scheduler, by hand, or with an added group) is therefore one
    that the factor multiplies. A rate that is changed during a step (by the optimizer itself, or by
    a hook) includes the factor.

    Args:
        optimizer: the optimizer, whose groups are read at each step and must all have a rate.
        scheduler: a scheduler of that optimizer, see :class:`SteppedSchedule`; None: the rates stay
            as they are set.
        unit: the unit of the scheduler's steps.
        reference_batch_size: examples per step of a scheduler that counts reference batches.

    Attributes:
        factor: the controller's factor.
        set_by_hand: whether anything but the scheduler changed a rate while the factor was not 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        unit: ScheduleUnit = "epoch",
        reference_batch_size: int = 1,
    ) -> None:
        self._optimizer = optimizer
        self._tensors: dict[int, tuple[Tensor, int, float]] = {}
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if not isinstance(rate, (Real, Tensor)):
                raise HessianFlowError(
                    f"parameter group {number} of {type(optimizer).__name__} has lr {rate!r}, which"
                    " a factor cannot multiply: build the optimizer with a number as its rate"
                )
        self._schedule: SteppedSchedule | None = None
        self._built: dict[str, Any] = {}
        if scheduler is not None:
            self._schedule = SteppedSchedule(scheduler, optimizer, unit)
            self._built = copy.deepcopy(scheduler.state_dict())
        self.unit = unit
        self.reference_batch_size = reference_batch_size
        self.factor = 1.0
        self.set_by_hand = False
        self._fraction = 0.0
        self._left = self._rates()

    @property
    def value(self) -> float:
        """Rate of the first parameter group, with the factor; valid between steps."""
        return self._rate(0, self._optimizer.param_groups[0]) * self.factor

    @contextmanager
    def in_force(self, factor: float) -> Iterator[None]:
        """Multiply the groups' rates by `factor`, in place of the previous factor, while active."""
        self.factor = factor
        if factor == 1:
            yield
            return
        rates = self._rates()
        self.set_by_hand = self.set_by_hand or rates[: len(self._left)] != self._left
        held = _holders(zip(self._optimizer.param_groups, rates, strict=True))
        marks = [_set(group, rate * factor) for group, rate in held]
        try:
            yield
        finally:
            for (group, rate), mark in zip(held, marks, strict=True):
                if _is_untouched(group, mark):
                    _set(group, rate)
                elif factor != 0:
                    _set(group, float(group["lr"]) / factor)
            self._left = self._rates()

    def step(self, loss: float = math.inf, accuracy: float | None = None) -> None:
        """Let the scheduler take one step; see :meth:`SteppedSchedule.step`."""
        if self._schedule is not None:
            self._schedule.step(loss, accuracy)
            self._left = self._rates()

    def end_epoch(self, loss: float, accuracy: float | None) -> None:
        """Let a scheduler that counts epochs take a step; see :meth:`SteppedSchedule.step`."""
        if self.unit == "epoch":
            self.step(loss, accuracy)

    def advance(self, examples: int) -> None:
        """Let a scheduler that counts updates or reference batches take its steps.

        Args:
            examples: the number of examples in the update that has just been made.
        """
        if self.unit == "update":
            self.step()
        if self.unit != "reference_batch":
            return
        self._fraction += examples / self.reference_batch_size
        for _ in range(int(self._fraction + 1e-9)):
            self.step()
            self._fraction -= 1

    @property
    def settings(self) -> dict[str, Any]:
        """Options with a public name and a plain value that the scheduler was built with."""
        kinds = (int, float, str, bool, list, tuple)
        plain = {key: value for key, value in self._built.items() if isinstance(value, kinds)}
        names = [key for key in plain if not key.startswith("_")]
        return {key: plain[key] for key in names if key not in ("last_epoch", "base_lrs")}

    def state_dict(self) -> dict[str, Any]:
        """Return the factor, the rates without it, and the scheduler's own state."""
        state: dict[str, Any] = {"factor": self.factor, "fraction": self._fraction}
        state["scheduled"] = self._rates()
        state["scheduler"] = None
        if self._schedule is not None:
            state["scheduler"] = self._schedule.scheduler.state_dict()
            state["steps"] = self._schedule.steps
            state["class"] = self._schedule.name
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`; the optimizer's state must have been loaded before."""
        self.factor = state["factor"]
        self._fraction = state["fraction"]
        schedule = self._schedule
        saved = state["scheduler"]
        if schedule is None and saved is not None:
            raise HessianFlowError("the checkpoint had a learning-rate scheduler, this run has no")
        if schedule is not None and saved is None:
            raise HessianFlowError("the checkpoint had no learning-rate scheduler, this run has a")
        if schedule is not None:
            if state["class"] != schedule.name:
                raise HessianFlowError(
                    f"the checkpoint had the scheduler {state['class']}, this run has"
                    f" {schedule.name}"
                )
            schedule.scheduler.load_state_dict(saved)
            schedule.steps = state["steps"]
        # The state of an optimizer from elsewhere need not hold its rates.
        for group, rate in zip(self._optimizer.param_groups, state["scheduled"], strict=True):
            _set(group, rate)
        self._left = self._rates()

    def _rates(self) -> list[float]:
        return [self._rate(*numbered) for numbered in enumerate(self._optimizer.param_groups)]

    def _rate(self, number: int, group: dict[str, Any]) -> float:
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            return float(rate)
        known = self._tensors.get(number)
        if known is None or known[0] is not rate or known[1] != rate._version:
            # Waits for the device once after each change: capturable optimizers keep rates there.
            known = self._tensors[number] = rate, rate._version, float(rate)
        return known[2]


def _holders(groups: Iterable[tuple[dict[str, Any], float]]) -> list[tuple[dict[str, Any], float]]:
    """Return groups and rates, without those that share the tensor of another group's rate.

    torch gives all groups the tensor that an optimizer is built with.
    """
    own: dict[int, tuple[dict[str, Any], float]] = {}
    for group, rate in groups:
        holder: object = group
        if isinstance(group["lr"], Tensor):
            holder = group["lr"]
        own[id(holder)] = (group, rate)
    return list(own.values())


Mark = tuple[float | Tensor, int]
"""A rate as it was set, and the version of its tensor, which counts the writes to it."""


def _set(group: dict[str, Any], rate: float) -> Mark:
    held = group["lr"]
    if not isinstance(held, Tensor):
        group["lr"] = rate
        return rate, 0
    held.fill_(rate)
    return held, held._version


def _is_untouched(group: dict[str, Any], mark: Mark) -> bool:
    """Return whether the rate was not set since `mark`, without waiting for the device."""
    rate = group["lr"]
    if isinstance(rate, Tensor):
        return rate is mark[0] and rate._version == mark[1]
    return bool(rate == mark[0])
