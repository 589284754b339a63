"""Unbiased estimates of noise and signal from independent parts, and of their ratio, with errors.

Let u_1 ... u_k be independent gradients (or updates) of parts with weights w_i (examples, for most
losses), with mean U and covariance C / w_i, and H_1 ... H_k the Hessians of the same parts. No
Hessian may meet a gradient of its own examples, so H_i is multiplied with

- d: the gradient of the part before, less the mean gradient of the parts other than these two;
- m: the mean gradient of all other parts.

Independence alone then gives

    E[d.H_i d] = tr(H C) (1 / w + 1 / W_d),        E[m.H_i m] = U.HU + tr(H C) / W_m,

where w is the weight of the part before and W_d and W_m are those of the two means. Neither tr(H C)
nor U.HU is therefore biased, whatever the law of gradients and Hessians. Without H the same holds
for any part in place of the part before.

Errors follow by the delta method: to first order, both numbers are means of independent
contributions of the parts. The ratio of two uncertain numbers is skewed and, where the denominator
may be 0, has no error; its limits are Fieller's (Some problems in interval estimation, 1954), which
may be infinite.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DEVIATIONS = 2.0
"""Standard errors on either side of the limits: 95 % for a normal variable."""


@dataclass(frozen=True)
class RatioEstimate:
    """An estimate of noise over signal.

    Attributes:
        value: the ratio in examples, infinite where the denominator is not surely positive and 0
            where the numerator is not positive; `reason` then says so.
        stderr: its standard error; infinite where the value is. A ratio is skewed, so `low` and
            `high` are more accurate.
        low: lower 95 % limit of the ratio, also where the value is not known.
        high: upper 95 % limit; infinite where the denominator is not surely positive.
        numerator: the noise of one example, tr(H C), or tr(C) in the simple form; unbiased.
        numerator_stderr: its standard error.
        denominator: the signal U.HU, or |U|^2 in the simple form; unbiased.
        denominator_stderr: its standard error.
        reason: why the ratio is not known; empty where it is.
    """

    value: float
    stderr: float
    low: float
    high: float
    numerator: float
    numerator_stderr: float
    denominator: float
    denominator_stderr: float
    reason: str = ""

    @property
    def is_known(self) -> bool:
        """Return whether the value is a ratio of positive numbers, with a sure denominator."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class PartProducts:
    """What the estimates need of each part, as float64 tensors of shape [parts].

    Attributes:
        weights: weights of the parts whose Hessians these are; ones in the simple form.
        noise_weights: weights of the parts before, whose gradients d deviate.
        noise: d.H d.
        noise_variances: 1 / w + 1 / W_d.
        signal: m.H m.
        signal_variances: 1 / W_m.
        both: d.H m.
    """

    weights: Tensor
    noise_weights: Tensor
    noise: Tensor
    noise_variances: Tensor
    signal: Tensor
    signal_variances: Tensor
    both: Tensor

    def ratio(self, examples_per_weight: float) -> RatioEstimate:
        """Return noise over signal in examples, where so many examples make up a unit of weight."""
        by_hessian = self.weights / self.weights.mean()
        by_gradient = self.noise_weights / self.noise_weights.mean()
        samples = self.noise / self.noise_variances
        noise = (by_hessian * samples).mean()
        raw = (by_hessian * self.signal).mean()
        excess = (by_hessian * self.signal_variances).mean()
        of_noise = by_hessian * (samples - noise)
        # A gradient counts in every mean m, with its share of the weights.
        of_means = by_hessian * (self.signal - raw) + 2 * by_gradient * self.both
        contributions = torch.stack([of_noise, of_means - excess * of_noise])
        scale = torch.tensor([examples_per_weight, 1.0], dtype=torch.float64)
        values = torch.stack([noise, raw - excess * noise]) * scale
        return _estimate(values, contributions * scale[:, None])


def _estimate(values: Tensor, contributions: Tensor) -> RatioEstimate:
    """Return the ratio of two numbers and its errors.

    Args:
        values: numerator and denominator, shape [2].
        contributions: those of independent parts to both, less the mean, shape [2, parts].
    """
    from scipy.special import ndtr, stdtrit

    noise, signal = values.tolist()
    parts = contributions.shape[1]
    centred = contributions - contributions.mean(dim=1, keepdim=True)
    # Two standard errors cover 95.4 %, as for a normal variable, also where parts are few.
    widening = float(stdtrit(parts - 1, ndtr(DEVIATIONS))) / DEVIATIONS
    covariance = widening**2 * centred @ centred.T / (parts * (parts - 1))
    (noise_variance, both), (_, signal_variance) = covariance.tolist()
    low, high = _limits(noise, signal, noise_variance, signal_variance, both)
    errors = (noise, math.sqrt(noise_variance), signal, math.sqrt(signal_variance))
    reason = _reason(*errors)
    if not signal > DEVIATIONS * math.sqrt(signal_variance):
        return RatioEstimate(math.inf, math.inf, low, high, *errors, reason)
    ratio = noise / signal
    variance = noise_variance - 2 * ratio * both + ratio**2 * signal_variance
    stderr = math.sqrt(max(variance, 0.0)) / signal
    return RatioEstimate(max(ratio, 0.0), stderr, low, high, *errors, reason)


def _reason(noise: float, noise_error: float, signal: float, signal_error: float) -> str:
    """Return why the ratio is not known; empty where it is."""
    if not signal > DEVIATIONS * signal_error:
        return (
            f"the signal {signal:.3g} +- {signal_error:.2g} is not surely positive: take more"
            " examples, and read `low` as the least that the noise scale may be"
        )
    if not noise > 0:
        return f"the noise {noise:.3g} +- {noise_error:.2g} is not positive: it costs no progress"
    return ""


def _limits(
    noise: float, signal: float, noise_variance: float, signal_variance: float, both: float
) -> tuple[float, float]:
    """Return Fieller's limits of noise / signal, as far as they are not negative.

    They enclose the ratios x for which noise - x signal lies within its own limits around 0.
    """
    square = DEVIATIONS**2
    leading = signal**2 - square * signal_variance
    if signal < 0 < leading:
        return 0.0, math.inf  # the signal is surely negative, and no ratio means anything
    middle = noise * signal - square * both
    last = noise**2 - square * noise_variance
    root = math.sqrt(max(middle**2 - leading * last, 0.0))
    low = 0.0
    if noise > 0 and last > 0 and middle + root > 0:
        low = last / (middle + root)
    if leading <= 0:
        return low, math.inf
    return low, max((middle + root) / leading, 0.0)
