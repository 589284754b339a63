"""CABS: a batch size coupled with the learning rate.

Balles, Romero, Hennig, "Coupling adaptive batch sizes with learning rates", UAI 2017,
arXiv:1612.05086.

    batch = scale * learning_rate * S / (loss - loss_floor)

S is the trace of the covariance of one example's gradient. S and loss are moving averages that
start at 0 and 1, without bias correction, as in the published code. The method is meant for plain
SGD, and the learning rate does not follow the batch.

Deviations: S comes from gradient norms at two batch sizes (see
:mod:`hessianflow.control.noise_scale`), not from second moments of every coordinate. The published
code decides after every update and has no hysteresis (every_updates=1, hysteresis=1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hessianflow.checks import check_count, check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.noise_scale import MOMENT_SIGNALS, defect, two_batch_estimate
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError


@dataclass
class CABSState(ControllerState):
    """Adds the moving averages of variance and loss, and the updates made by the last decision."""

    variance: float = 0.0
    loss: float = 1.0
    updates: int = 0


class CABS(BoundedController[CABSState]):
    """Set the batch to learning rate times gradient variance over loss.

    Every `every_updates` updates it uses these signals:
        learning_rate: Rate in force.
        train_loss: Mean training loss of the latest batch.
        small_gradient_sq, small_batch_size, large_gradient_sq, large_batch_size: As for
            `NoiseScale`.

    Args:
        batch_size: Examples per step at the start.
        max_batch_size: Largest examples per step (2048 in the published code).
        min_batch_size: Smallest examples per step (16 in the published code).
        smoothing: Weight of the past in the moving averages, in [0, 1) (0.95 in the published
            code).
        scale: Constant factor of the batch size (c; 1 in the paper).
        loss_floor: Known lower bound of the loss, as with label smoothing (0 in the paper).
        every_updates: Updates between two decisions, each of which waits for the device. This
            default is our choice.
        hysteresis: Smallest factor by which the batch changes. This default is our choice.
    """

    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int = 2048,
        *,
        min_batch_size: int = 16,
        smoothing: float = 0.95,
        scale: float = 1.0,
        loss_floor: float = 0.0,
        every_updates: int = 10,
        hysteresis: float = 1.25,
    ) -> None:
        super().__init__(
            CABSState(batch_size),
            max_batch_size,
            min_batch_size=min_batch_size,
            hysteresis=hysteresis,
            lr_rule="none",
        )
        self.smoothing = check_number("smoothing", smoothing, low=0, high=1)
        if smoothing == 1:
            raise HessianFlowError(
                "smoothing must be < 1, got 1: the averages would stay where they start"
            )
        self.scale = check_number("scale", scale, above=0)
        self.loss_floor = check_number("loss_floor", loss_floor, low=-math.inf)
        self.every_updates = check_count("every_updates", every_updates)

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return a floor that is no larger than the first batch of the run."""
        return {"min_batch_size": min(16, run.batch_size)}

    @property
    def needs(self) -> frozenset[str]:
        """Name the learning rate, the loss and the four gradient moments."""
        return MOMENT_SIGNALS | {"learning_rate", "train_loss"}

    def is_due(self, progress: Progress) -> bool:
        """Return whether `every_updates` updates were made since the last decision."""
        return progress.updates >= self._state.updates + self.every_updates

    def _decide(self, measured: Measured, /) -> str:
        require_signals(self.needs, measured.signals)
        state = self._state
        signals = measured.signals
        rate = signals["learning_rate"]
        state.updates = measured.progress.updates
        if unusable := defect(signals):
            return f"variance unknown: {unusable}"
        if not math.isfinite(signals["train_loss"] * rate):
            return f"batch unknown: loss {signals['train_loss']}, rate {rate} must be finite"
        past = self.smoothing
        state.variance = past * state.variance + (1 - past) * two_batch_estimate(signals)[1]
        state.loss = past * state.loss + (1 - past) * (signals["train_loss"] - self.loss_floor)
        if not state.loss > 0:
            return f"batch undefined: loss above its floor is {state.loss:.4g}, must be positive"
        why = f"rate {rate:.4g} * variance {state.variance:.4g} / loss {state.loss:.4g}"
        return self._move_to(self.scale * rate * state.variance / state.loss, why)
