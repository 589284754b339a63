"""DiveBatch: a batch that grows with the diversity of the gradients.

DiveBatch, arXiv:2509.16173. Gradient diversity is that of Yin et al., "Gradient diversity: a key
ingredient for scalable distributed learning", AISTATS 2018.

    GD = sum_i ||g_i||^2 / ||sum_i g_i||^2,
    batch = max(min(max(delta * GD * N, batch), cap), floor),

Here i runs over the N examples of an epoch, and the batch never shrinks. GD is 1 for orthogonal
gradients and 1/n for n equal ones.

Deviations: sum_i ||g_i||^2 is not summed from one norm per example but estimated as n (||G||^2 + S)
from gradient norms at two batch sizes (see :mod:`hessianflow.control.noise_scale`). Figures that
are not finite change nothing, where the published code takes the cap. As in the published code, the
weights move during the epoch, so GD does not belong to a single point.
"""

import math

from hessianflow.checks import check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule
from hessianflow.control.noise_scale import MOMENT_SIGNALS, defect, two_batch_estimate
from hessianflow.interfaces.control import UNKNOWN


def gradient_diversity(sum_of_squares: float, square_of_sum: float) -> float:
    """Return sum_i ||g_i||^2 / ||sum_i g_i||^2.

    It is infinite when the gradients cancel, and NaN when a figure is NaN.
    """
    if square_of_sum <= 0:
        return math.inf
    return sum_of_squares / square_of_sum


class DiveBatch(BoundedController[ControllerState]):
    """Grow the batch to a multiple of gradient diversity times the size of the training set.

    Once per epoch it uses these signals, which a `GradientMoments(accumulate=True)` observer
    measures:
        small_gradient_sq, small_batch_size, large_gradient_sq, large_batch_size: As for
            `NoiseScale`.
        gradient_sum_sq: ||sum of the gradients of all examples since the last decision||^2.
        gradient_examples: Number of examples in that sum.

    Args:
        batch_size: Examples per step at the start, and the floor (128 in the published code).
        max_batch_size: Largest examples per step (2048 in the published code).
        delta: Multiple of the diversity that the batch is set to (0.02 in the published code).
        hysteresis: Smallest factor by which the batch grows. This default is our choice.
        lr_rule: Rule by which the learning rate follows the batch. This default is our choice.
        max_lr_factor: Cap on the factor of the learning rate; null stands for no cap.
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
            hysteresis=hysteresis,
            lr_rule=lr_rule,
            max_lr_factor=max_lr_factor,
        )
        self.delta = check_number("delta", delta, above=0)

    @property
    def needs(self) -> frozenset[str]:
        """Name the gradient signals while the batch can still grow, then nothing."""
        if self._state.batch_size >= self.max_batch_size:
            return frozenset()
        return MOMENT_SIGNALS | {"gradient_sum_sq", "gradient_examples"}

    def _decide(self, measured: Measured, /) -> str:
        if not self.needs:
            return ""
        signals = measured.signals
        require_signals(self.needs, signals)
        if unusable := defect(signals):
            return f"gradient diversity unknown: {unusable}"
        examples = measured.progress.examples_per_epoch
        if examples == UNKNOWN:  # The examples seen since the last decision stand for an epoch.
            examples = int(signals["gradient_examples"])
        sum_of_squares = signals["gradient_examples"] * sum(two_batch_estimate(signals))
        square_of_sum = signals["gradient_sum_sq"]
        diversity = gradient_diversity(sum_of_squares, square_of_sum)
        if not math.isfinite(diversity * examples):
            figures = f"{sum_of_squares:.4g} / {square_of_sum:.4g}"
            return f"gradient diversity unknown: {figures} is not finite"
        target = max(self.delta * diversity * examples, self._state.batch_size)
        return self._move_to(target, f"gradient diversity {diversity:.4g}")
