"""DiveBatch: the batch grows with the diversity of the gradients.

DiveBatch, arXiv:2509.16173; gradient diversity after Yin et al., "Gradient diversity: a key
ingredient for scalable distributed learning", AISTATS 2018.

    GD = sum_i ||g_i||^2 / ||sum_i g_i||^2,
    batch = max(min(max(delta * GD * N, batch), cap), floor),

over the examples of an epoch, N of them; the batch never shrinks. GD = 1 for orthogonal gradients
of equal count, 1/n when all n are the same.

Deviations: instead of one norm an example, sum_i ||g_i||^2 is estimated as n (||G||^2 + S) from
gradient norms at two batch sizes (see :mod:`hessianflow.control.noise_scale`); figures that are not
finite change nothing (the published code takes the cap). As there, the weights move during the
epoch, so GD is that of no single point.
"""

import math

from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import check_number, check_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule
from hessianflow.control.noise_scale import MOMENT_SIGNALS, defect, two_batch_estimate


def gradient_diversity(sum_of_squares: float, square_of_sum: float) -> float:
    """sum_i ||g_i||^2 / ||sum_i g_i||^2; infinite when the gradients cancel, NaN when a figure
    is."""
    if math.isnan(square_of_sum):
        return math.nan
    return sum_of_squares / square_of_sum if square_of_sum > 0 else math.inf


class DiveBatch(BoundedController[ControllerState]):
    """Set the batch to a multiple of gradient diversity times the size of the training set; never
    shrink it.

    Signals used, once per epoch (a `GradientMoments(accumulate=True)` observer measures them):
        small_gradient_sq, small_batch_size, large_gradient_sq, large_batch_size: as for
        `NoiseScale`. gradient_sum_sq: ||sum of the gradients of all examples since the last
        decision||^2. gradient_examples: how many examples that sum is over.

    Args:
        batch_size: examples per step at the start (the published floor is 128).
        max_batch_size: the cap (2048 in the published code).
        delta: the multiple (0.02 in the published code).
        hysteresis: a growth by less than this factor is not made (ours: 1.25).
        lr_rule: how the learning rate follows (ours: linear).
        max_lr_factor: cap of the learning-rate factor.

    Raises:
        HessianFlowError: an argument is out of its bounds.
    """

    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int = 2048,
        *,
        delta: float = 0.02,
        hysteresis: float = 1.25,
        lr_rule: LRRule = "linear",
        max_lr_factor: float | None = None,
    ) -> None:
        super().__init__(
            ControllerState(batch_size),
            max_batch_size,
            min_batch_size=None,
            hysteresis=hysteresis,
            lr_rule=lr_rule,
            max_lr_factor=max_lr_factor,
        )
        self.delta = check_number("delta", delta, above=0)

    @property
    def needs(self) -> frozenset[str]:
        """The gradient moments and the accumulated gradient while the batch can still grow, then
        nothing."""
        can_grow = self._state.batch_size < self.max_batch_size
        return (
            MOMENT_SIGNALS | {"gradient_sum_sq", "gradient_examples"} if can_grow else frozenset()
        )

    def _decide(self, measured: Measured, /) -> str:
        if not self.needs:
            return ""
        check_signals(self.needs, measured.signals)
        if unusable := defect(measured.signals):
            return f"gradient diversity unknown: {unusable}"
        examples, signals = measured.progress.examples_per_epoch, measured.signals
        sum_of_squares = signals["gradient_examples"] * sum(two_batch_estimate(signals))
        diversity = gradient_diversity(sum_of_squares, signals["gradient_sum_sq"])
        if not math.isfinite(diversity * examples):
            return (
                f"gradient diversity unknown: {sum_of_squares:.4g} /"
                f" {signals['gradient_sum_sq']:.4g} is not finite"
            )
        return self._move_to(
            max(self.delta * diversity * examples, self._state.batch_size),
            f"gradient diversity {diversity:.4g}",
        )
