"""Schedulers from any source: their fit to the run, their steps and their length."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from hessianflow.checks import check_choice, check_count
from hessianflow.interfaces import HessianFlowError
from hessianflow.training.extent import Extent

ScheduleUnit = Literal["epoch", "reference_batch", "update"]

_LENGTHS = ("total_steps", "T_max", "total_iters", "t_initial")
"""Names that schedulers of torch and timm give to the number of steps they are built for."""
_EACH: Mapping[ScheduleUnit, str] = {
    "epoch": "once per epoch",
    "reference_batch": "once per reference batch of examples",
    "update": "once per update",
}


@dataclass(frozen=True)
class Schedule:
    """The learning-rate schedule of a run, and the batch size that its rates are stated at.

    Attributes:
        scheduler: any scheduler of torch or timm, built for the optimizer of the run. A rate that
            it sets in the optimizer's groups (or that is set by hand, at any time) is the rate at
            the reference batch size; during each step the controller's factor multiplies it. None:
            the rates stay as they are set.
        unit: "epoch": the scheduler takes one step per epoch. "reference_batch": it takes one step
            per reference batch of examples, int(epochs * num_examples / reference_batch_size) in
            all, so that a schedule counted in steps keeps its meaning when the batch grows.
            "update": it takes one step per optimizer step, as in a hand-written loop; if the batch
            grows, it takes fewer steps over the same examples.
        reference_batch_size: the batch size at which the learning rate is stated; None: the batch
            size at the start of the run.
    """

    scheduler: LRScheduler | None = None
    unit: ScheduleUnit = "epoch"
    reference_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("Schedule.unit", self.unit, get_args(ScheduleUnit))
        start = "that of the start"
        check_count("Schedule.reference_batch_size", self.reference_batch_size, none=start)


class SteppedSchedule:
    """A learning-rate scheduler as the trainer steps it.

    Args:
        scheduler: a scheduler of torch; any object with the same `step()`; or one with timm's
            `step(epoch)` and `step_update(num_updates)`, which are given the steps taken so far.
        optimizer: the optimizer whose rates it must set.
        unit: the unit of its steps.

    Raises:
        HessianFlowError: the object is no scheduler, belongs to another optimizer, was made for the
            other unit, or has a step with arguments that the trainer cannot supply; or a
            ReduceLROnPlateau is to step within epochs.
    """

    def __init__(self, scheduler: LRScheduler, optimizer: Optimizer, unit: ScheduleUnit) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.name = described(scheduler)
        _check_methods(scheduler)
        _check_owner(scheduler, optimizer)
        self._watches = isinstance(scheduler, ReduceLROnPlateau)
        if self._watches and unit != "epoch":
            raise HessianFlowError('ReduceLROnPlateau watches epochs: use it with unit="epoch"')
        self._counted = _counted_step(scheduler, unit)

    def step(self, loss: float, accuracy: float | None) -> None:
        """Take one step; a ReduceLROnPlateau of mode "min" watches the loss, else the accuracy.

        Raises:
            HessianFlowError: the mode is "max" and there is no accuracy, or the optimizer has
                parameter groups that the scheduler was not made for.
        """
        self.steps += 1
        try:
            if self._watches:
                self.scheduler.step(self._watched(loss, accuracy))  # type: ignore[arg-type]
            elif self._counted is not None:
                getattr(self.scheduler, self._counted)(self.steps)
            else:
                self.scheduler.step()
        except HessianFlowError:
            raise
        except (ValueError, KeyError, IndexError) as error:
            groups = len(self.scheduler.optimizer.param_groups)
            raise HessianFlowError(
                f"{self.name} could not take its step {self.steps}: {type(error).__name__}:"
                f" {error}; the optimizer has {groups} parameter groups now: make the scheduler for"
                " all of them"
            ) from error

    def _watched(self, loss: float, accuracy: float | None) -> float:
        if getattr(self.scheduler, "mode", "min") != "max":
            return loss
        if accuracy is None:
            raise HessianFlowError(
                'ReduceLROnPlateau(mode="max") needs evaluation data with an accuracy'
            )
        return accuracy


def described(scheduler: object) -> str:
    """Return the class of a scheduler and those of the schedulers in it: SequentialLR(StepLR)."""
    inner = [described(part) for part in getattr(scheduler, "_schedulers", ())]
    return with_inner(type(scheduler).__name__, inner)


def with_inner(name: str, inner: Sequence[str]) -> str:
    """Return `name`, followed in parentheses by the inner names if there are any."""
    if not inner:
        return name
    return f"{name}({', '.join(inner)})"


def length(scheduler: object) -> int | None:
    """Return the number of steps after which the schedule is over; None: it is not known.

    The length of a SequentialLR follows from its last milestone and its last part, that of a
    transformers schedule from a keyword of its lambda.
    """
    parts: Sequence[object] = getattr(scheduler, "_schedulers", ())
    if isinstance(scheduler, SequentialLR):
        last = length(parts[-1])
        if last is None:
            return None
        return int(scheduler._milestones[-1]) + last
    if parts:
        return max(filter(None, map(length, parts)), default=None)
    if isinstance(scheduler, LambdaLR):
        return max(filter(None, map(_length_of_lambda, scheduler.lr_lambdas)), default=None)
    for name in _LENGTHS:
        value = getattr(scheduler, name, None)
        if isinstance(value, (int, float)) and value > 0:
            return math.ceil(value)
    return None


def steps_of_run(unit: ScheduleUnit, extent: Extent, reference_batch_size: int) -> int | None:
    """Return the steps that a scheduler takes in a run; None if later batch sizes decide."""
    if unit == "epoch":
        return extent.total("epochs")
    if unit == "update":
        return extent.total("updates")
    examples = extent.total("examples")
    if examples is None:
        return None
    return examples // reference_batch_size


def misfit(
    scheduler: LRScheduler | None, unit: ScheduleUnit, extent: Extent, reference_batch_size: int
) -> str:
    """Return a warning about a schedule whose end the run does not reach; "" if it does.

    Raises:
        HessianFlowError: the schedule was built for one step per batch but would take one per
            epoch, or it would raise an error before the run ends.
    """
    planned = length(scheduler)
    steps = steps_of_run(unit, extent, reference_batch_size)
    if planned is None or steps is None:
        return ""
    name = type(scheduler).__name__
    each = _EACH[unit].replace("once", "one")
    if isinstance(scheduler, OneCycleLR) and planned < steps:
        raise HessianFlowError(
            f"{name} is built for {planned} steps, and this run takes {steps}, {each}: "
            f"build it with total_steps={steps}"
        )
    within = steps_of_run("reference_batch", extent, reference_batch_size)
    if unit == "epoch" and within is not None:
        per_epoch = extent.examples_per_epoch / reference_batch_size
        fewest = steps * math.floor(per_epoch)
        most = steps * math.ceil(per_epoch)
        if steps < fewest <= planned <= most:
            raise HessianFlowError(
                f"{name} is built for {planned} steps, one per batch, but would take {steps}, one"
                f' per epoch: pass unit="reference_batch" and build it for {within} steps, or build'
                f" it for {steps}"
            )
    if planned <= steps:
        return ""
    return (
        f"{name} is built for {planned} steps and this run takes {steps}, {each}: "
        f"its end is not reached; {steps} would fit"
    )


def _length_of_lambda(function: object) -> int | None:
    if isinstance(function, partial):
        steps = function.keywords.get("num_training_steps")
        if isinstance(steps, int):
            return steps
    return None


def _check_methods(scheduler: object) -> None:
    for name in ("step", "state_dict", "load_state_dict"):
        if not callable(getattr(scheduler, name, None)):
            raise HessianFlowError(
                f"scheduler must be a learning-rate scheduler with {name}(), got a"
                f" {type(scheduler).__name__}"
            )


def _check_owner(scheduler: Any, optimizer: Optimizer) -> None:
    """Refuse a scheduler of another optimizer, unless one wraps the other and shares its groups."""
    owner = getattr(scheduler, "optimizer", None)
    if owner is None or owner is optimizer:
        return
    own = {id(group) for group in optimizer.param_groups}
    if not any(id(group) in own for group in owner.param_groups):
        raise HessianFlowError(
            f"the scheduler {type(scheduler).__name__} sets the rates of a different"
            f" {type(owner).__name__}: build it from the {type(optimizer).__name__} that is passed"
            " as the optimizer"
        )


def _counted_step(scheduler: Any, unit: ScheduleUnit) -> str | None:
    """Return the name of the method that takes the number of steps; None: `step()` counts them."""
    name = type(scheduler).__name__
    in_epochs = getattr(scheduler, "t_in_epochs", None)
    if in_epochs is not None and in_epochs != (unit == "epoch"):
        other = "reference_batch"
        if in_epochs:
            other = "epoch"
        raise HessianFlowError(
            f'{name} was made with t_in_epochs={in_epochs}: use it with unit="{other}"'
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        return None
    if isinstance(getattr(scheduler, "lr_scheduler", None), ReduceLROnPlateau):
        raise HessianFlowError(f"{name} needs a figure at each step: use torch's ReduceLROnPlateau")
    required = required_arguments(scheduler.step)
    if not required:
        return None
    method = "step_update"
    if unit == "epoch":
        method = "step"
    if required != ["epoch"] or not hasattr(scheduler, method):
        raise HessianFlowError(
            f"{name}.step needs {', '.join(required)}, which the trainer cannot pass"
            f" {_EACH[unit]}: give the scheduler a step() without arguments"
        )
    return method


def required_arguments(function: Callable[..., object]) -> list[str]:
    """Return the names of the arguments without which a function cannot be called."""
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in free]
