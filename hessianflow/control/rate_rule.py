"""Another learning-rate rule under any controller: the batch is the controller's, the rate follows
it by the rule."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hessianflow.control.lr_scaling import LRRule, check_rule, lr_factor
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

    Not for a controller that finds the rate itself, as CriticalBatch with its stability bound: it
    takes the rate in force for the schedule's times its own factor.

    Args:
        controller: decides everything else.
        rule: "linear", "sqrt" or "none"; see :mod:`hessianflow.control.lr_scaling`.
        max_factor: cap of the factor; None: no cap.

    Raises:
        HessianFlowError: an unknown rule, or a cap that is not positive.
    """

    def __init__(
        self, controller: BatchController, rule: LRRule, *, max_factor: float | None = None
    ) -> None:
        check_rule(rule)
        self.controller, self.rule, self.max_factor = controller, rule, max_factor
        self._reference = controller.decision.batch_size
        lr_factor(self._reference, self._reference, rule, max_factor=max_factor)  # checks the cap

    @property
    def needs(self) -> frozenset[str]:
        """The controller's."""
        return self.controller.needs

    @property
    def decision(self) -> Decision:
        """The controller's, with the factor of the rule."""
        return self._ruled(self.controller.decision)

    def forget_reference(self) -> None:
        """The controller's, if it has one."""
        if isinstance(self.controller, ForgetsReference):
            self.controller.forget_reference()

    def is_due(self, progress: Progress) -> bool:
        """As the controller says."""
        return self.controller.is_due(progress)

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision:
        """The controller's decision, with the factor of the rule."""
        return self._ruled(self.controller.update(progress, reading, signals))

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.controller.load_state_dict(state)

    def _ruled(self, decision: Decision) -> Decision:
        factor = lr_factor(
            decision.batch_size, self._reference, self.rule, max_factor=self.max_factor
        )
        return replace(decision, lr_factor=factor)
