"""A batch size set to the gradient noise scale, or to the size of best goodput.

McCandlish, Kaplan, Amodei, "An empirical model of large-batch training", arXiv:1812.06162, appendix
A.1. Goodput follows Qiao et al., "Pollux", OSDI 2021.

With G the gradient and S the trace of the covariance of one example's gradient, a mean gradient
over b examples has E||g||^2 = ||G||^2 + S / b. Two sizes b < B give unbiased estimates

    ||G||^2 = (B ||g_B||^2 - b ||g_b||^2) / (B - b),      S = (||g_b||^2 - ||g_B||^2) / (1/b - 1/B).

They are smoothed separately, because their ratio is biased, and then divided: the noise scale
S / ||G||^2 is the size beyond which more examples help little. A single estimate of ||G||^2 may
well not be positive. It stays in the average, and while the average is not positive the noise scale
is undefined and nothing changes.

Deviation: both estimates enter the averages relative to their sum ||G||^2 + S, the mean squared
gradient norm of one example. Gradients shrink by orders of magnitude during training, so averages
of the raw figures would describe the first epochs for a long time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hessianflow.checks import check_count, check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule
from hessianflow.interfaces.errors import HessianFlowError

MOMENT_SIGNALS = frozenset(
    {"small_gradient_sq", "small_batch_size", "large_gradient_sq", "large_batch_size"}
)


def defect(signals: Mapping[str, float]) -> str:
    """Return why the signals in `MOMENT_SIGNALS` give no estimate, or an empty string."""
    require_signals(MOMENT_SIGNALS, signals)
    if not all(math.isfinite(signals[name]) for name in MOMENT_SIGNALS):
        return "gradient moments are not finite"
    if math.isclose(signals["small_batch_size"], signals["large_batch_size"], rel_tol=1e-9):
        return (
            f"microbatches are as large as the batch ({signals['large_batch_size']:.4g}), use"
            " smaller ones"
        )
    return ""


def two_batch_estimate(signals: Mapping[str, float]) -> tuple[float, float]:
    """Return ||G||^2 and S from signals without a :func:`defect`; either may be negative."""
    large = signals["large_gradient_sq"]
    size = signals["large_batch_size"]
    noise = (signals["small_gradient_sq"] - large) / (1 / signals["small_batch_size"] - 1 / size)
    return large - noise / size, noise


def goodput(
    batch_size: int, seconds: float, noise_scale: float, reference_batch_size: int
) -> float:
    """Return the examples per second, each weighed by its worth relative to the reference size.

    That is (batch_size / seconds) * (noise_scale + reference_batch_size) / (noise_scale +
    batch_size), where `seconds` is the time of one optimizer step of `batch_size` examples.
    """
    return batch_size / seconds * (noise_scale + reference_batch_size) / (noise_scale + batch_size)


@dataclass
class NoiseScaleState(ControllerState):
    """Adds the moving average of ||G||^2 / (||G||^2 + S), to which that of S adds up to 1."""

    signal_share: float | None = None


class NoiseScale(BoundedController[NoiseScaleState]):
    """Set the batch to the gradient noise scale, or to the measured size of best goodput.

    Once per epoch it uses these signals, which a `GradientMoments` observer measures if a step has
    two or more microbatches:
        small_gradient_sq: Mean of ||g||^2 over microbatches.
        small_batch_size: Harmonic mean of the sizes of microbatches.
        large_gradient_sq: Mean of ||g||^2 over optimization batches.
        large_batch_size: Harmonic mean of the sizes of optimization batches.

    Args:
        batch_size: Examples per step at the start. The learning rate is stated for this size.
        max_batch_size: Largest examples per step.
        min_batch_size: Smallest examples per step; null stands for `batch_size`.
        seconds_per_batch: Measured seconds of one step by batch size. The batch is then the one of
            these sizes, within floor and cap, that has the best goodput; null stands for the noise
            scale itself.
        smoothing: Weight of the past in the moving averages, in [0, 1]. This default is our choice:
            every signal already covers an epoch.
        hysteresis: Smallest factor by which the batch changes. This default is our choice.
        lr_rule: Rule by which the learning rate follows the batch.
        max_lr_factor: Cap on the factor of the learning rate; null stands for no cap.
    """

    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        min_batch_size: int | None = None,
        seconds_per_batch: Mapping[int, float] | None = None,
        smoothing: float = 0.5,
        hysteresis: float = 1.5,
        lr_rule: LRRule = "linear",
        max_lr_factor: float | None = None,
    ) -> None:
        super().__init__(
            NoiseScaleState(batch_size),
            max_batch_size,
            min_batch_size=min_batch_size,
            hysteresis=hysteresis,
            lr_rule=lr_rule,
            max_lr_factor=max_lr_factor,
        )
        self.smoothing = check_number("smoothing", smoothing, low=0, high=1)
        self.seconds_per_batch = self._allowed(seconds_per_batch)

    def _allowed(self, seconds_per_batch: Mapping[int, float] | None) -> dict[int, float]:
        """Return the measured sizes from floor to cap."""
        if seconds_per_batch is None:
            return {}
        if not isinstance(seconds_per_batch, Mapping):
            raise HessianFlowError(
                f"seconds_per_batch must map sizes to seconds, got {seconds_per_batch!r}"
            )
        allowed = {}
        for size, seconds in seconds_per_batch.items():
            check_count("seconds_per_batch sizes", size)
            check_number(f"seconds_per_batch[{size}]", seconds, above=0)
            if self.min_batch_size <= size <= self.max_batch_size:
                allowed[size] = seconds
        if not allowed:
            raise HessianFlowError(
                f"seconds_per_batch must hold a size from {self.min_batch_size} to"
                f" {self.max_batch_size}, got {sorted(seconds_per_batch)}"
            )
        return allowed

    @property
    def needs(self) -> frozenset[str]:
        """Name the four gradient moments."""
        return MOMENT_SIGNALS

    def forget_reference(self) -> None:
        """Start the moving average again, because the loss changes here."""
        self._state.signal_share = None

    def _decide(self, measured: Measured, /) -> str:
        if unusable := defect(measured.signals):
            return f"noise scale unknown: {unusable}"
        gradient_sq, noise = two_batch_estimate(measured.signals)
        if not gradient_sq + noise > 0:
            why = (
                f"squared gradient norm of one example {gradient_sq + noise:.4g}, must be positive"
            )
            return f"noise scale unknown: {why}"
        share = gradient_sq / (gradient_sq + noise)
        past = self._state.signal_share
        if past is not None:
            share = self.smoothing * past + (1 - self.smoothing) * share
        self._state.signal_share = share
        if not 0 < share < 1:
            why = f"||G||^2 is {share:.4g} of ||G||^2 + S, must be between 0 and 1"
            return f"noise scale undefined: {why}"
        scale = (1 - share) / share
        if not self.seconds_per_batch:
            return self._move_to(scale, f"noise scale {scale:.4g}")
        return self._move_to(*self._best(scale))

    def _best(self, scale: float) -> tuple[int, str]:
        """Return the size of best goodput, and why."""
        first = self.initial_batch_size
        values = {b: goodput(b, t, scale, first) for b, t in self.seconds_per_batch.items()}
        best = max(values, key=lambda size: (values[size], -size))
        why = f"best goodput {values[best]:.4g} examples/s at {best}, noise scale {scale:.4g}"
        return best, why
