"""Another learning-rate rule for any controller, which still decides the batch size."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.interfaces.control import (
    NO_SIGNALS,
    BatchController,
    CurvatureReading,
    Decision,
    ForgetsReference,
    Progress,
)


class RateRule:
    """A controller whose learning-rate factor is replaced by a rule of batch / reference batch.

    It does not suit a controller that finds the rate itself, such as CriticalBatch with its
    stability bound, which takes the rate in force for the schedule's times its own factor.

    Args:
        controller: Controller that decides everything else.
        rule: "linear", "sqrt" or "none"; see :mod:`hessianflow.control.lr_scaling`.
        max_factor: Cap on the factor; None stands for no cap.
    """

    def __init__(
        self, controller: BatchController, rule: LRRule, *, max_factor: float | None = None
    ) -> None:
        self.controller = controller
        self.rule = rule
        self.max_factor = max_factor
        self._reference = controller.decision.batch_size
        self._ruled(controller.decision)  # checks the rule and the cap

    @property
    def needs(self) -> frozenset[str]:
        """Name the signals that the controller wants."""
        return self.controller.needs

    @property
    def decision(self) -> Decision:
        """Return the controller's setting with the factor of the rule."""
        return self._ruled(self.controller.decision)

    def forget_reference(self) -> None:
        """Let the controller forget its reference, if it has one."""
        if isinstance(self.controller, ForgetsReference):
            self.controller.forget_reference()

    def is_due(self, progress: Progress) -> bool:
        """Return whether the controller is due."""
        return self.controller.is_due(progress)

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision:
        """Return the controller's decision with the factor of the rule."""
        return self._ruled(self.controller.update(progress, reading, signals))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller, as the rule has none."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.controller.load_state_dict(state)

    def _ruled(self, decision: Decision) -> Decision:
        factor = lr_factor(
            decision.batch_size, self._reference, self.rule, max_factor=self.max_factor
        )
        return replace(decision, lr_factor=factor)
