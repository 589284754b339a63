"""The base of controllers that follow a measured target size within a floor and a cap."""

import math
from typing import TypeVar, get_args

from hessianflow.checks import check_choice, check_number
from hessianflow.control.checks import check_optional_count, check_optional_number
from hessianflow.control.controller import Controller, ControllerState
from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.interfaces.errors import HessianFlowError

S = TypeVar("S", bound=ControllerState)


class BoundedController(Controller[S]):
    """Move the batch to a target size when the change is large enough.

    Args:
        state: First setting. The learning rate is stated for its batch size.
        max_batch_size: Largest examples per step.
        min_batch_size: Smallest examples per step; None stands for the first batch size.
        hysteresis: Smallest factor, up or down, by which the batch changes. With 1 every change is
            made.
        lr_rule: Rule by which the learning rate follows the batch, see
            :mod:`hessianflow.control.lr_scaling`.
        max_lr_factor: Cap on the factor of the learning rate; None stands for no cap.
    """

    def __init__(
        self,
        state: S,
        max_batch_size: int,
        *,
        min_batch_size: int | None = None,
        hysteresis: float,
        lr_rule: LRRule = "linear",
        max_lr_factor: float | None = None,
    ) -> None:
        super().__init__(state, max_batch_size)
        batch_size = state.batch_size
        # No floor is 0: the check refuses that.
        self.min_batch_size = check_optional_count("min_batch_size", min_batch_size) or batch_size
        if self.min_batch_size > batch_size:
            raise HessianFlowError(
                f"min_batch_size must be <= batch_size {batch_size}, got {min_batch_size}"
            )
        self.hysteresis = check_number("hysteresis", hysteresis, low=1)
        check_choice("lr_rule", lr_rule, get_args(LRRule))
        self.lr_rule: LRRule = lr_rule
        self.max_lr_factor = check_optional_number("max_lr_factor", max_lr_factor, above=0)
        self.initial_batch_size = batch_size

    def _move_to(self, target: float, why: str) -> str:
        """Move to the target, within floor and cap.

        Return `why` if the batch changes, with a note where a bound cut it, else an empty string.
        """
        state = self._state
        # Floats, because the bound may be compared with an infinite target.
        within = min(max(target, float(self.min_batch_size)), float(self.max_batch_size))
        size = math.floor(within + 0.5)
        # Rounding may take part of an example off a change, which must not make it too small.
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
        if size == self.min_batch_size > target:
            return f"{why}, raised to the floor"
        return why
