"""What controllers share that follow a measured target size: floor, cap, hysteresis, and a rate
that follows."""

import math
from typing import TypeVar

from hessianflow.control.checks import check_count, check_number
from hessianflow.control.controller import Controller, ControllerState
from hessianflow.control.lr_scaling import LRRule, check_rule, lr_factor
from hessianflow.interfaces.errors import HessianFlowError

S = TypeVar("S", bound=ControllerState)


class BoundedController(Controller[S]):
    """Moves the batch to a target when the change is large enough.

    Args:
        state: the first setting; the learning rate belongs to its batch size.
        max_batch_size: the cap.
        min_batch_size: the floor; None: the first batch size.
        hysteresis: a change by less than this factor, up or down, is not made. 1: every change is.
        lr_rule: how the learning rate follows, see :mod:`hessianflow.control.lr_scaling`.
        max_lr_factor: cap of the learning-rate factor.

    Raises:
        HessianFlowError: an argument is out of its bounds.
    """

    def __init__(
        self,
        state: S,
        max_batch_size: int,
        *,
        min_batch_size: int | None,
        hysteresis: float,
        lr_rule: LRRule,
        max_lr_factor: float | None,
    ) -> None:
        super().__init__(state, max_batch_size)
        batch_size = state.batch_size
        self.min_batch_size = (
            batch_size if min_batch_size is None else check_count("min_batch_size", min_batch_size)
        )
        if self.min_batch_size > batch_size:
            raise HessianFlowError(
                f"min_batch_size must be <= batch_size {batch_size}, got {min_batch_size}"
            )
        self.hysteresis = check_number("hysteresis", hysteresis, low=1)
        check_rule(lr_rule)
        self.lr_rule: LRRule = lr_rule
        self.max_lr_factor = (
            None if max_lr_factor is None else check_number("max_lr_factor", max_lr_factor, above=0)
        )
        self.initial_batch_size = batch_size

    def _move_to(self, target: float, why: str) -> str:
        """Go to the target within floor and cap; `why` is returned if the batch changes, else an
        empty string."""
        state = self._state
        # Without the float the rounding of an infinite target would raise.
        within = min(max(target, float(self.min_batch_size)), float(self.max_batch_size))
        size = math.floor(within + 0.5)
        # A change that is large enough is not refused for the part of an example that rounding
        # takes off it.
        ratio = max(
            change
            for new in (size, within)
            for change in (new / state.batch_size, state.batch_size / new)
        )
        if size == state.batch_size or ratio < self.hysteresis:
            return ""
        state.batch_size = size
        state.lr_factor = lr_factor(
            size, self.initial_batch_size, self.lr_rule, max_factor=self.max_lr_factor
        )
        if size == self.max_batch_size < target:
            return f"{why}, capped"
        return f"{why}, raised to the floor" if size == self.min_batch_size > target else why
