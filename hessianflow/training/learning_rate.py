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
"""A notice, given once a run where there is such a factor."""


class LearningRate:
    """Multiplies the rates in the optimizer's groups by a factor, for as long as a step takes.

    Between steps every group holds its rate without the factor, as stated at the reference batch
    size. Setting a rate (by a scheduler, by hand, or with an added group) therefore sets what the
    factor multiplies, at any time; the rates at the start of the run are not remembered. A rate
    that is changed during a step (by the optimizer itself, or by a hook) includes the factor.

    Args:
        optimizer: the optimizer, whose groups are read at each step.
        scheduler: a scheduler of that optimizer; None: the rates stay as they are set.
        unit: what the scheduler's steps count.
        reference_batch_size: examples of one step that is counted in reference batches.

    Attributes:
        unit: as given.
        reference_batch_size: as given.
        factor: the controller's factor.
        set_by_hand: whether anything but the scheduler changed a rate while there was a factor
            other than 1.

    Raises:
        HessianFlowError: a group without a rate; a scheduler that does not fit, see
            :class:`SteppedSchedule`.
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
            _check_rate(type(optimizer).__name__, number, group.get("lr"))
        self._schedule: SteppedSchedule | None = None
        if scheduler is not None:
            self._schedule = SteppedSchedule(scheduler, optimizer, unit)
        self.unit = unit
        self.reference_batch_size = reference_batch_size
        self.factor = 1.0
        self.set_by_hand = False
        self._fraction = 0.0
        self._built = {} if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._left = self._rates()

    @property
    def value(self) -> float:
        """The rate of the first parameter group, with the factor; asked between steps."""
        return self._rate(0, self._optimizer.param_groups[0]) * self.factor

    @contextmanager
    def in_force(self, factor: float) -> Iterator[None]:
        """Set the groups' rates times `factor` while active (absolute, not on top of the factor
        before)."""
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
        """Let a scheduler that counts reference batches take as many steps as have become whole,
        now that so many further examples were trained."""
        if self.unit == "epoch":
            return
        self._fraction += examples / self.reference_batch_size
        for _ in range(int(self._fraction + 1e-9)):
            self.step()
            self._fraction -= 1

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the scheduler was built with, as far as they are plain values with a
        public name."""
        plain = (int, float, str, bool, list, tuple)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self._built.items()
            if isinstance(value, plain)
            and not key.startswith("_")
            and key not in ("last_epoch", "base_lrs")
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the factor, the rates without it, and the scheduler's own state."""
        schedule = self._schedule
        return {
            "factor": self.factor,
            "scheduled": self._rates(),
            "scheduler": None if schedule is None else schedule.scheduler.state_dict(),
            "steps": 0 if schedule is None else schedule.steps,
            "fraction": self._fraction,
            "class": type(None).__name__ if schedule is None else schedule.name,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the optimizer's state must have been loaded before."""
        self.factor, self._fraction = state["factor"], state["fraction"]
        schedule = self._schedule
        if (schedule is None) != (state["scheduler"] is None):
            had, has = ("a", "no") if schedule is None else ("no", "a")
            raise HessianFlowError(
                f"the checkpoint had {had} learning-rate scheduler, this run has {has}"
            )
        if schedule is not None:
            made = state["class"]  # earlier versions name the outermost alone
            if made not in (schedule.name, type(schedule.scheduler).__name__):
                raise HessianFlowError(
                    f"the checkpoint had the scheduler {made}, this run has {schedule.name}"
                )
            schedule.scheduler.load_state_dict(state["scheduler"])
            schedule.steps = state.get("steps", 0)
        # States of earlier versions hold rates with the factor in the optimizer, and those without
        # it here.
        for group, rate in zip(self._optimizer.param_groups, state["scheduled"], strict=True):
            _set(group, rate)
        self._left = self._rates()

    def _rates(self) -> list[float]:
        return [
            self._rate(number, group) for number, group in enumerate(self._optimizer.param_groups)
        ]

    def _rate(self, number: int, group: dict[str, Any]) -> float:
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            return float(rate)
        known = self._tensors.get(number)
        if known is None or known[0] is not rate or known[1] != rate._version:
            # Waits for the device, once after each change: capturable optimizers keep the rate
            # there.
            known = self._tensors[number] = rate, rate._version, float(rate)
        return known[2]


def _holders(groups: Iterable[tuple[dict[str, Any], float]]) -> list[tuple[dict[str, Any], float]]:
    """Groups with their rates, one for each rate: torch gives all groups the tensor that an
    optimizer is built with."""
    own = {
        id(group["lr"] if isinstance(group["lr"], Tensor) else group): (group, rate)
        for group, rate in groups
    }
    return list(own.values())


Mark = tuple[float | Tensor, int]
"""A rate as it was set, and the version of its tensor, which counts what is written to it."""


def _set(group: dict[str, Any], rate: float) -> Mark:
    held = group["lr"]
    if not isinstance(held, Tensor):
        group["lr"] = rate
        return rate, 0
    held.fill_(rate)
    return held, held._version


def _is_untouched(group: dict[str, Any], mark: Mark) -> bool:
    """Return whether nobody set the rate of the group since; found without waiting for the
    device."""
    rate = group["lr"]
    if isinstance(rate, Tensor):
        return rate is mark[0] and rate._version == mark[1]
    return bool(rate == mark[0])


def _check_rate(optimizer: str, number: int, rate: object) -> None:
    if isinstance(rate, (Real, Tensor)):
        return
    raise HessianFlowError(
        f"parameter group {number} of {optimizer} has lr {rate!r}, which a factor cannot multiply: "
        "build the optimizer with a number as its rate"
    )
