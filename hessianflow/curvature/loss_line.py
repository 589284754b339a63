"""The loss along a displacement of the weights, by forward passes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.sharding import own_part

ASIDE = 0.02
"""Distance of the passes to both sides of the weights, in critical rates. Our choice."""
ROUNDINGS = 32
"""Machine epsilons of the loss that a change must be expected to exceed to tell anything."""
ROUNDINGS_16_BIT = 2
"""The same where weights have 16 bits: more of them than this would be most of the loss."""


def _rounding(parameters: Sequence[Tensor]) -> float:
    """Return the relative change of a loss that its rounding may explain."""
    eps = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    if eps > torch.finfo(torch.float32).eps:
        return ROUNDINGS_16_BIT * eps
    return ROUNDINGS * eps


class LossLine:
    """The loss along an update; the weights are put back at the end, bit for bit.

    They are written to by `.data`, which leaves a graph of the caller's usable: to autograd the
    weights have not changed, and when the graph is used they have not.

    Attributes:
        passes: forward passes made.
        rounding: change of the loss that rounding may explain.
    """

    def __init__(self, operator: HessianOperator, moved: Tensor, slope: float) -> None:
        self._operator = operator
        self._weights = [own_part(parameter) for parameter in operator.parameters]
        self._steps = torch.split(moved, [weight.numel() for weight in self._weights])
        self._slope = slope
        self._start = operator.mean_loss()
        if not math.isfinite(self._start):
            raise NonFiniteError(
                "the loss is not finite (nan or inf); look at the weights and the inputs"
            )
        self.passes = 1
        self.rounding = _rounding(operator.parameters) * abs(self._start)

    def __enter__(self) -> "LossLine":
        self._origins = [weight.detach().clone() for weight in self._weights]
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for weight, origin in zip(self._weights, self._origins, strict=True):
                weight.data.copy_(origin)

    def _change(self, scale: float) -> float:
        """Return L(w - scale d) - L(w); infinite if that loss is nan."""
        self.passes += 1
        with torch.no_grad():
            for weight, origin, step in zip(self._weights, self._origins, self._steps, strict=True):
                # In the type of the step, because weights of 16 bits have no such scales.
                weight.data.copy_(torch.sub(origin, step.view_as(origin), alpha=scale))
        change = self._operator.mean_loss() - self._start
        if math.isnan(change):
            return math.inf
        return change

    def rise(self, scale: float) -> float:
        """Return the change per scale, or that of the slope where rounding would drown it."""
        if scale * self._slope < self.rounding:
            return -self._slope
        return self._change(scale) / scale

    def curvature(self, critical: float) -> float:
        """Return d.H d from the losses a little to both sides."""
        fall = critical * self._slope  # also the rise of the parabola as far as this
        share = max(ASIDE, min(0.5, math.sqrt(self.rounding / fall)))
        scale = share * critical
        return (self._change(scale) + self._change(-scale)) / scale**2
