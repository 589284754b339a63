"""The gradient noise scale as the batch size, or the batch of best goodput.

McCandlish, Kaplan, Amodei, "An empirical model of large-batch training", arXiv:1812.06162, appendix
A.1; goodput after Qiao et al., "Pollux", OSDI 2021.

With G the gradient and S the trace of the covariance of one example's gradient, a mean gradient
over b examples has E||g||^2 = ||G||^2 + S / b. From two sizes b < B follow unbiased estimates

    ||G||^2 = (B ||g_B||^2 - b ||g_b||^2) / (B - b),      S = (||g_b||^2 - ||g_B||^2) / (1/b - 1/B),

which are smoothed apart (their ratio is biased) and then divided: noise scale = S / ||G||^2, the
size beyond which more examples help little. A ||G||^2 that is not positive is normal for single
estimates: it stays in the average, and while the average is not positive the noise scale is
undefined and nothing changes.

Deviation: both estimates enter the averages relative to their sum ||G||^2 + S, the mean squared
gradient norm of one example. Gradients shrink by orders of magnitude during training; averages of
the raw figures would go on describing the first epochs long after.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import check_count, check_number, check_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule
from hessianflow.interfaces.errors import HessianFlowError

MOMENT_SIGNALS = frozenset(
    {"small_gradient_sq", "small_batch_size", "large_gradient_sq", "large_batch_size"}
)


def defect(signals: Mapping[str, float]) -> str:
    """Why the signals in `MOMENT_SIGNALS` carry no estimate; empty when they do.

    Raises:
        HessianFlowError: a signal is missing.
    """
    check_signals(MOMENT_SIGNALS, signals)
    if not all(math.isfinite(signals[name]) for name in MOMENT_SIGNALS):
        return "gradient moments are not finite"
    if math.isclose(signals["small_batch_size"], signals["large_batch_size"], rel_tol=1e-9):
        return (
            f"microbatches are as large as the batch ({signals['large_batch_size']:.4g}), use"
            " smaller ones"
        )
    return ""


def two_batch_estimate(signals: Mapping[str, float]) -> tuple[float, float]:
    """(||G||^2, S) from signals without a :func:`defect`; either may come out negative."""
    small, large = signals["small_gradient_sq"], signals["large_gradient_sq"]
    noise = (small - large) / (1 / signals["small_batch_size"] - 1 / signals["large_batch_size"])
    return large - noise / signals["large_batch_size"], noise


def goodput(
    batch_size: int, seconds: float, noise_scale: float, reference_batch_size: int
) -> float:
    """Return the examples per second, discounted by how much less each is worth than at the
    reference size.

    (batch_size / seconds) * (noise_scale + reference_batch_size) / (noise_scale + batch_size);
    `seconds` is the time of one optimizer step at `batch_size`.
    """
    return batch_size / seconds * (noise_scale + reference_batch_size) / (noise_scale + batch_size)


@dataclass
class NoiseScaleState(ControllerState):
    """Adds the moving average of ||G||^2 / (||G||^2 + S); that of S / (||G||^2 + S) is the rest to
    1."""

    signal_share: float | None = None


class NoiseScale(BoundedController[NoiseScaleState]):
    """Set the batch to the gradient noise scale, or to the measured size of best goodput.

    Signals used, once per epoch (a `GradientMoments` observer measures them, given two or more
    microbatches a step):
        small_gradient_sq: mean of ||g||^2 over microbatches.
        small_batch_size: harmonic mean of their sizes.
        large_gradient_sq: mean of ||g||^2 over optimization batches.
        large_batch_size: harmonic mean of their sizes.

    Args:
        batch_size: examples per step at the start; the learning rate belongs to this size.
        max_batch_size: the cap.
        min_batch_size: the floor; None: `batch_size`.
        seconds_per_batch: seconds of one step by batch size, if measured. The batch is then the one
            of these sizes, within floor and cap, that has the best goodput at the noise scale
            found.
        smoothing: weight of the past in the moving averages (ours: 0.5, as every signal already
            covers an epoch).
        hysteresis: a change by less than this factor is not made (ours: 1.5).
        lr_rule: how the learning rate follows.
        max_lr_factor: cap of the learning-rate factor.

    Raises:
        HessianFlowError: an argument is out of its bounds.
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
        self.seconds_per_batch = (
            {} if seconds_per_batch is None else self._checked(seconds_per_batch)
        )

    def _checked(self, seconds_per_batch: Mapping[int, float]) -> dict[int, float]:
        if not isinstance(seconds_per_batch, Mapping):
            raise HessianFlowError(
                f"seconds_per_batch must map sizes to seconds, got {seconds_per_batch!r}"
            )
        found = {}
        for size, seconds in seconds_per_batch.items():
            check_count("seconds_per_batch sizes", size)
            check_number(f"seconds_per_batch[{size}]", seconds, above=0)
            if self.min_batch_size <= size <= self.max_batch_size:
                found[size] = seconds
        if not found:
            raise HessianFlowError(
                f"seconds_per_batch must hold a size from {self.min_batch_size} to"
                f" {self.max_batch_size}, got {sorted(seconds_per_batch)}"
            )
        return found

    @property
    def needs(self) -> frozenset[str]:
        """The four gradient moments."""
        return MOMENT_SIGNALS

    def forget_reference(self) -> None:
        """The moving average starts again: the loss is another one from here on."""
        self._state.signal_share = None

    def _decide(self, measured: Measured, /) -> str:
        if unusable := defect(measured.signals):
            return f"noise scale unknown: {unusable}"
        gradient_sq, noise = two_batch_estimate(measured.signals)
        if not gradient_sq + noise > 0:
            return (
                "noise scale unknown: squared gradient norm of one example"
                f" {gradient_sq + noise:.4g}, must be positive"
            )
        past, share = self._state.signal_share, gradient_sq / (gradient_sq + noise)
        share = share if past is None else self.smoothing * past + (1 - self.smoothing) * share
        self._state.signal_share = share
        if not 0 < share < 1:
            return (
                f"noise scale undefined: ||G||^2 is {share:.4g} of ||G||^2 + S, must be between 0"
                " and 1"
            )
        scale = (1 - share) / share
        if not self.seconds_per_batch:
            return self._move_to(scale, f"noise scale {scale:.4g}")
        return self._move_to(*self._best(scale))

    def _best(self, scale: float) -> tuple[int, str]:
        values = {
            b: goodput(b, t, scale, self.initial_batch_size)
            for b, t in self.seconds_per_batch.items()
        }
        best = max(values, key=lambda size: (values[size], -size))
        return (
            best,
            f"best goodput {values[best]:.4g} examples/s at {best}, noise scale {scale:.4g}",
        )
