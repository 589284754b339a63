"""Seesaw: half of every decay of the learning rate becomes growth of the batch.

Meterez, Morwani, Wu, Oncescu, Pehlevan, Kakade, "Seesaw: accelerating training by balancing
learning rate and batch size scheduling", arXiv:2510.14717.

Wherever a schedule would multiply the rate by 1/a, the rate is multiplied by 1/sqrt(a) and the
batch by a. With s the factor of the schedule, 1 at its peak, and B0 the first batch,

    batch = B0 / s,      rate = peak * s * (batch / B0)^(1/2).

An optimizer that divides by the size of the gradient, while that size is mostly noise and so falls
with 1 / sqrt(batch), takes the steps of SGD with rate * sqrt(batch). What SGD learns from an
example depends on its rate / batch (Theorem 1 of the paper), here rate / sqrt(batch), which is that
of the schedule replaced. For SGD itself the exponent is 1: the batch grows instead of any decay, as
in Smith et al., ICLR 2018.

Under an optimizer that normalises, exponent 1 is refused. The rate of SGD that its steps amount to,
rate * sqrt(batch), would grow with every decay without bound: where the batch grows by a, the rate
must fall by at least sqrt(a). This is our derivation, under the same assumption of gradients that
are mostly noise; the statement of the paper itself was not at hand.

Deviations: s is read off the rate in force, so that any schedule is exchanged, even one that reacts
to the loss or starts again. The paper replaces a smooth schedule by steps. Here the rate follows
the schedule between two growths, and rate / sqrt(batch) is right at any time. Once the cap is
reached, the rate falls as the schedule says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from hessianflow.checks import check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError

LOOKS = 100
"""Least number of looks at the rate in a run. This default is our choice."""
Exchange = Literal["sqrt", "linear"]


@dataclass
class SeesawState(ControllerState):
    """Adds the highest rate of the schedule so far, and the looks at the rate that were taken."""

    peak_rate: float = 0.0
    looks: int = 0


class Seesaw(BoundedController[SeesawState]):
    """Grow the batch where the schedule lowers the learning rate, and lower the rate by less.

    It looks at the rate at the first update of every epoch, and more often in a run of fewer than
    100 epochs. In a run that ends after a number of updates or examples, it looks 100 times. Decays
    count from the highest rate so far, so that a warm-up changes nothing. Where the schedule raises
    the rate again, the batch shrinks.

    It uses this signal:
        learning_rate: Rate in force.

    Args:
        batch_size: Examples per step at the start, and the floor.
        max_batch_size: Largest examples per step.
        growth: Smallest factor of the batch at a change (a). With 2, as in the abstract of the
            paper, each halving of the rate is exchanged when it is complete.
        exchange: Rule by which the rate follows the batch: "sqrt" for optimizers that divide by the
            size of the gradients, "linear" for SGD. The command takes that of the optimizer.

    Raises:
        HessianFlowError: An argument is out of its bounds.
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "cosine"}

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        growth: float = 2.0,
        exchange: Exchange = "sqrt",
    ) -> None:
        check_number("growth", growth, above=1)
        if exchange not in get_args(Exchange):
            raise HessianFlowError(f"exchange must be sqrt or linear, got {exchange!r}")
        super().__init__(
            SeesawState(batch_size),
            max_batch_size,
            min_batch_size=None,
            hysteresis=growth,
            lr_rule=exchange,
            max_lr_factor=None,
        )

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the exchange that belongs to the optimizer, unless it is that of the class."""
        if run.optimizer == "sgd":
            return {"exchange": "linear"}
        return {}

    @classmethod
    def refuses(cls, run: RunFacts, options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with the schedule, the rule or the optimizer."""
        if run.schedule == "constant":
            return (
                "it exchanges decays of the rate for growth of the batch, and --schedule constant"
                " has none: use cosine, multistep, polynomial or cooldown"
            )
        if run.lr_rule is not None:
            return f"--lr-rule {run.lr_rule} would replace its own: use --controller.exchange"
        # The optimizer of a user may be of either kind.
        normalises = run.optimizer != "sgd" and ":" not in run.optimizer
        if options["exchange"] == "linear" and normalises:
            return (
                f"--controller.exchange linear diverges with {run.optimizer}, whose rate must fall"
                " by at least the root of the growth: use sqrt"
            )
        return ""

    @property
    def needs(self) -> frozenset[str]:
        """Name the learning rate."""
        return frozenset({"learning_rate"})

    def is_due(self, progress: Progress) -> bool:
        """Return whether a new stretch of the run has begun, of which an epoch has whole ones."""
        return self._looks(progress) > self._state.looks

    def _looks(self, progress: Progress) -> int:
        """Return the number of stretches begun, the present one included."""
        if progress.done is not None or progress.passed is not None:
            return math.ceil(progress.fraction * LOOKS)
        assert progress.total_epochs is not None
        per_epoch = -(-LOOKS // progress.total_epochs)
        return -(-progress.examples * per_epoch // progress.examples_per_epoch)

    def _decide(self, measured: Measured, /) -> str:
        require_signals(self.needs, measured.signals)
        state = self._state
        state.looks = self._looks(measured.progress)
        scheduled = measured.signals["learning_rate"] / state.lr_factor
        if not 0 <= scheduled < math.inf:
            return f"rate {scheduled:.4g} is negative or not finite"
        state.peak_rate = max(state.peak_rate, scheduled)
        # A rate of 0 before any other is the beginning of a warm-up; later it is the last decay.
        target = float(self.min_batch_size)
        if scheduled > 0:
            target *= state.peak_rate / scheduled
        elif state.peak_rate > 0:
            target = float(self.max_batch_size)
        return self._move_to(
            target, f"scheduled rate {scheduled:.4g} after a peak of {state.peak_rate:.4g}"
        )
