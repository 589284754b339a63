"""The learning rate of a run: a schedule of the user's, times the controller's factor."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hessianflow.interfaces import HessianFlowError

ScheduleUnit = Literal["epoch", "reference_batch"]


class LearningRate:
    """Keeps (scheduled rate) x (factor) in every parameter group.

    Schedulers read the rate they last set from the optimizer, so the factor is taken out before each of their steps and
    put back after it; any :class:`LRScheduler` works unchanged below a factor that changes at any time.

    Args:
        optimizer: its current rates are the scheduled ones, stated at the reference batch size.
        scheduler: any torch scheduler of that optimizer, or None for a constant rate.
        unit: what the scheduler's steps count.

    Raises:
        HessianFlowError: a ReduceLROnPlateau that should step within epochs.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: LRScheduler | None = None, unit: ScheduleUnit = "epoch"
    ) -> None:
        if unit == "reference_batch" and isinstance(scheduler, ReduceLROnPlateau):
            raise HessianFlowError('ReduceLROnPlateau watches epochs: use it with schedule_unit="epoch"')
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._scheduled = [_get(group) for group in optimizer.param_groups]
        self.factor = 1.0
        self._fraction = 0.0

    @property
    def value(self) -> float:
        """The rate of the first parameter group."""
        return _get(self._optimizer.param_groups[0])

    def set_factor(self, factor: float) -> None:
        """Multiply the scheduled rate by `factor` (absolute, not on top of the factor before)."""
        self.factor = factor
        self._apply()

    def step(self, loss: float = math.inf, accuracy: float | None = None) -> None:
        """Let the scheduler take one step.

        Args:
            loss: what a ReduceLROnPlateau of mode "min" watches.
            accuracy: what one of mode "max" watches.

        Raises:
            HessianFlowError: mode "max" without an accuracy.
        """
        if self._scheduler is None:
            return
        for group, rate in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            _set(group, rate)
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if self._scheduler.mode == "max" and accuracy is None:
                raise HessianFlowError('ReduceLROnPlateau(mode="max") needs evaluation data with an accuracy')
            self._scheduler.step(accuracy if self._scheduler.mode == "max" and accuracy is not None else loss)
        else:
            self._scheduler.step()
        self._scheduled = [_get(group) for group in self._optimizer.param_groups]
        self._apply()

    def advance(self, steps: float) -> None:
        """Let the scheduler take as many steps as have become whole: for schedules counted in reference batches."""
        self._fraction += steps
        for _ in range(int(self._fraction + 1e-9)):
            self.step()
            self._fraction -= 1

    def state_dict(self) -> dict[str, Any]:
        """Factor, scheduled rates and the scheduler's own state."""
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {
            "factor": self.factor,
            "scheduled": list(self._scheduled),
            "scheduler": scheduler,
            "fraction": self._fraction,
            "class": type(self._scheduler).__name__,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the optimizer's state must have been loaded before."""
        self.factor, self._fraction = state["factor"], state["fraction"]
        self._scheduled = list(state["scheduled"])
        if (self._scheduler is None) != (state["scheduler"] is None):
            had, has = ("a", "no") if self._scheduler is None else ("no", "a")
            raise HessianFlowError(f"the checkpoint had {had} learning-rate scheduler, this run has {has}")
        if state["class"] != type(self._scheduler).__name__:
            own = type(self._scheduler).__name__
            raise HessianFlowError(f"the checkpoint had the scheduler {state['class']}, this run has {own}")
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._scheduled, strict=True):
            _set(group, rate * self.factor)


def _get(group: dict[str, Any]) -> float:
    return float(group["lr"])


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # capturable optimizers keep the rate on the device
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
