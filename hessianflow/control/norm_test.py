"""Norm test: a batch that grows until the noise of its gradient is a small part of it.

Byrd, Chin, Nocedal, Wu, "Sample size selection in optimization methods for machine learning",
Mathematical Programming 134, 2012, equations 3.9 and 3.12. Lau, Li, Xu, Liu, Kolar, "Adaptive batch
size schedules for distributed training of language models with data and model parallelism",
arXiv:2412.21124, take the gradients of workers as the sample, as here.

With g_B the mean gradient over a batch of B examples, and S the trace of the covariance of one
example's gradient, so that Var(g_B) = S / B, the batch passes if

    Var(g_B) <= eta^2 ||g_B||^2,      and else becomes      ceil(S / (eta^2 ||g_B||^2)).

It never shrinks. As ||g_B||^2 contains the noise, E||g_B||^2 = ||G||^2 + S / B, one test multiplies
the batch by at most 1 / eta^2, and it comes to rest where B = (1 / eta^2 - 1) S / ||G||^2: at
1 / eta^2 - 1 times the noise scale of :mod:`hessianflow.control.noise_scale`.

Deviations: S and ||G||^2 come from the squared gradient norms of microbatches (of all ranks) and of
whole batches, averaged over the updates between two tests, and are smoothed, both as for the noise
scale. The published tests take one batch each. Changes of less than the hysteresis are not made.
"""

import math
from dataclasses import dataclass

from hessianflow.checks import check_count, check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule
from hessianflow.control.noise_scale import MOMENT_SIGNALS, defect, two_batch_estimate
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError


@dataclass
class NormTestState(ControllerState):
    """Adds the moving average of ||G||^2 / (||G||^2 + S), and the updates made by the last test."""

    signal_share: float | None = None
    updates: int = 0


class NormTest(BoundedController[NormTestState]):
    """Grow the batch when the variance of its gradient exceeds a share of the squared norm.

    Every `every_updates` updates it uses these signals, which a `GradientMoments` observer measures
    if a step has two or more microbatches:
        small_gradient_sq, small_batch_size, large_gradient_sq, large_batch_size: As for
            `NoiseScale`.

    Args:
        batch_size: Examples per step at the start, and the floor.
        max_batch_size: Largest examples per step.
        eta: Largest standard deviation of the gradient as a share of its norm, in (0, 1). This
            default is our choice.
        every_updates: Updates between two tests, each of which waits for the device (1 as
            published). This default is our choice.
        smoothing: Weight of the past in the moving average, in [0, 1) (0 as published). This
            default is our choice.
        hysteresis: Smallest factor by which the batch grows (1 as published). This default is our
            choice.
        lr_rule: Rule by which the learning rate follows the batch (none in Byrd et al.).
        max_lr_factor: Cap on the factor of the learning rate; null stands for no cap.

    Raises:
        HessianFlowError: An argument is out of its bounds.
    """

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        eta: float = 0.5,
        every_updates: int = 10,
        smoothing: float = 0.5,
        hysteresis: float = 1.25,
        lr_rule: LRRule = "none",
        max_lr_factor: float | None = None,
    ) -> None:
        super().__init__(
            NormTestState(batch_size),
            max_batch_size,
            min_batch_size=None,
            hysteresis=hysteresis,
            lr_rule=lr_rule,
            max_lr_factor=max_lr_factor,
        )
        self.eta = check_number("eta", eta, above=0, high=1)
        if eta == 1:
            raise HessianFlowError(
                "eta must be < 1, got 1: the noise of a gradient is part of its norm, so that every"
                " batch would pass"
            )
        self.every_updates = check_count("every_updates", every_updates)
        self.smoothing = check_number("smoothing", smoothing, low=0, high=1)
        if smoothing == 1:
            raise HessianFlowError(
                "smoothing must be < 1, got 1: the average would stay where it starts"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Name the four gradient moments while the batch can still grow, then nothing."""
        if self._state.batch_size >= self.max_batch_size:
            return frozenset()
        return MOMENT_SIGNALS

    def is_due(self, progress: Progress) -> bool:
        """Return whether `every_updates` updates were made since the last test, below the cap."""
        return bool(self.needs) and progress.updates >= self._state.updates + self.every_updates

    def forget_reference(self) -> None:
        """Start the moving average again, because the loss changes here."""
        self._state.signal_share = None

    def _decide(self, measured: Measured, /) -> str:
        state = self._state
        state.updates = measured.progress.updates
        if not self.needs:
            return ""
        require_signals(self.needs, measured.signals)
        if unusable := defect(measured.signals):
            return f"norm test unknown: {unusable}"
        gradient_sq, noise = two_batch_estimate(measured.signals)
        if not gradient_sq + noise > 0:
            return (
                "norm test unknown: squared gradient norm of one example"
                f" {gradient_sq + noise:.4g}, must be positive"
            )
        share = gradient_sq / (gradient_sq + noise)
        if state.signal_share is not None:
            share = self.smoothing * state.signal_share + (1 - self.smoothing) * share
        state.signal_share = share
        variance = (1 - share) / state.batch_size
        squared_norm = share + variance
        if not squared_norm > 0:
            return f"norm test undefined: ||g_B||^2 is {squared_norm:.4g} of ||G||^2 + S"
        ratio = variance / squared_norm
        wanted = max(math.ceil(ratio * state.batch_size / self.eta**2), state.batch_size)
        return self._move_to(wanted, f"norm test: variance {ratio:.4g} of the squared norm")
