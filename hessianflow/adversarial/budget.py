"""Limits of an attack: how far it may move an input, and within which range of values.

Perturbations are measured in units of eps, delta = eps * u with u in the unit ball of the norm. So
a value per channel (eps / std for inputs normalised by std) needs no code of its own, even in l_2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

Norm = Literal["l_inf", "l_2"]
PerChannel = float | Sequence[float] | Tensor
"""One number, or one for each channel (dimension 1 of the inputs)."""
ValueRange = tuple[PerChannel, PerChannel]
"""Smallest and largest valid input value."""
RANGE_SLACK = 1e-3
"""Part of its width by which inputs may leave the stated range, as images normalised in half
precision do by rounding."""


@dataclass(frozen=True)
class Budget:
    """The ball |delta| <= eps in `norm`, cut by the valid range.

    Attributes:
        eps: Radius, shape [] or [channels]; after :func:`broadcast_to`, broadcastable to the
            inputs.
        low: Smallest valid value, shaped like eps; None stands for no bound.
        high: Largest valid value, shaped like eps; None stands for no bound.
        norm: "l_inf" or "l_2" (over all components of one example).
    """

    eps: Tensor
    low: Tensor | None
    high: Tensor | None
    norm: Norm

    def clamp(self, x: Tensor) -> Tensor:
        """Return the nearest inputs in the valid range."""
        if self.low is None:
            return x
        return torch.clamp(x, self.low, self.high)

    def project(self, perturbed: Tensor, x: Tensor) -> Tensor:
        """Project into the ball around `x`, then into the valid range, which contains `x`."""
        if self.norm == "l_inf":
            return self.clamp(torch.clamp(perturbed, x - self.eps, x + self.eps))
        delta = perturbed - x
        return self.clamp(x + delta / self.length(delta).clamp(min=1.0))

    def length(self, delta: Tensor) -> Tensor:
        """Return the l_2 norm of delta / eps, shape [N, 1, ...]; a zero eps counts as unmoved."""
        u = torch.where(self.eps > 0, delta / self.eps, torch.zeros_like(delta))
        return _row_norm(u)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Return the delta of length eps that raises a linear function of this gradient most."""
        if self.norm == "l_inf":
            return self.eps * gradient.sign()
        scaled = self.eps * gradient
        norm = _row_norm(scaled)
        # A zero gradient gives no direction, so such an example stays where it is.
        return self.eps * torch.where(norm > 0, scaled / norm, torch.zeros_like(scaled))

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return uniformly distributed deltas from the ball, shaped like `x`."""
        device = generator.device
        if self.norm == "l_inf":
            uniform = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype)
            return self.eps * (2 * uniform - 1).to(x.device)
        direction = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        rows = (x.shape[0], *[1] * (x.ndim - 1))
        radius = torch.rand(rows, generator=generator, device=device, dtype=x.dtype) ** (
            1 / max(x[:1].numel(), 1)
        )
        return self.eps * (direction / _row_norm(direction) * radius).to(x.device)


def make_budget(eps: PerChannel, value_range: ValueRange | None, norm: Norm) -> Budget:
    """Check the limits of the user and return them as one budget."""
    if norm not in ("l_inf", "l_2"):
        raise HessianFlowError(f"norm must be 'l_inf' or 'l_2', got {norm!r}")
    radius = _as_tensor(eps, "eps")
    if not bool(torch.isfinite(radius).all() and (radius >= 0).all()):
        raise HessianFlowError(f"eps must be finite and at least 0, got {_show(radius)}")
    if value_range is None:
        return Budget(radius, None, None, norm)
    low, high = _range(value_range)
    radius, low, high = _broadcast(radius, low, high)
    # In l_2 eps bounds the whole perturbation, which may be longer than the range of a component.
    if norm == "l_inf" and bool((radius > high - low).any()):
        raise HessianFlowError(
            f"eps must not exceed the width {_show(high - low)} of value_range, got"
            f" {_show(radius)}; state it in the units of the inputs (divide by the std for"
            " normalised ones)"
        )
    return Budget(radius, low, high, norm)


def check_one_tensor(value: object, name: str = "inputs", purpose: str = "to be perturbed") -> None:
    """Refuse inputs in a structure, which does not say what tensor is to be perturbed how far.

    The message has `name` for the value, and `purpose` for what it must be one tensor for.
    """
    if not isinstance(value, Tensor):
        raise HessianFlowError(f"{name} must be one tensor {purpose}, got {article(value)}")


def broadcast_to(budget: Budget, x: Tensor) -> Budget:
    """Return the budget on the device and in the precision of `x`, broadcast over its channels."""
    check_one_tensor(x)
    if not x.is_floating_point():
        raise HessianFlowError(
            f"inputs must be floating point to be perturbed, got {x.dtype}; convert them (for"
            " images: x.float() / 255)"
        )

    def shaped(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if value.ndim and (x.ndim < 2 or x.shape[1] != len(value)):
            raise HessianFlowError(
                "eps and value_range must have one value per channel (dimension 1) of the inputs, "
                f"got {len(value)} values for inputs of shape {list(x.shape)}"
            )
        moved = value.to(device=x.device, dtype=x.dtype, non_blocking=True)
        if value.ndim == 0:
            return moved
        return moved.reshape(1, -1, *[1] * (x.ndim - 2))

    eps = shaped(budget.eps)
    assert eps is not None
    return Budget(eps, shaped(budget.low), shaped(budget.high), budget.norm)


def check_in_range(budget: Budget, x: Tensor) -> None:
    """Refuse inputs outside the valid range by more than rounding, which clamping would distort.

    It waits for the device, so training checks only its first batch.
    """
    if budget.low is None or budget.high is None or x.numel() == 0:
        return
    slack = RANGE_SLACK * (budget.high - budget.low)
    if bool(((x < budget.low - slack) | (x > budget.high + slack)).any()):
        raise HessianFlowError(
            f"inputs must lie in value_range [{_show(budget.low)}, {_show(budget.high)}], got"
            f" values from {float(x.min()):g} to {float(x.max()):g}; give the range of the inputs"
            " as the model sees them"
        )


def _range(value_range: ValueRange) -> tuple[Tensor, Tensor]:
    if not isinstance(value_range, (tuple, list, Tensor)) or len(value_range) != 2:
        raise HessianFlowError(
            f"value_range must be (low, high) or None for no clamping, got {value_range!r}"
        )
    low, high = _broadcast(*(_as_tensor(end, "value_range") for end in value_range))
    if not bool((low < high).all()):
        raise HessianFlowError(
            f"value_range must have low < high, got [{_show(low)}, {_show(high)}]"
        )
    return low, high


def _as_tensor(value: PerChannel, name: str) -> Tensor:
    try:
        tensor: Tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").squeeze()
    except (TypeError, ValueError):
        raise HessianFlowError(
            f"{name} must be a number or one number per channel, got {value!r}"
        ) from None
    if tensor.ndim > 1:
        raise HessianFlowError(
            f"{name} must be a number or one number per channel, got a tensor of shape"
            f" {list(tensor.shape)}"
        )
    return tensor


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    channels = {len(t) for t in tensors if t.ndim}
    if len(channels) > 1:
        raise HessianFlowError(
            f"eps and value_range must agree on the number of channels, got {sorted(channels)}"
        )
    return tuple(tensor.expand(tuple(channels)) for tensor in tensors)


def _row_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm.reshape(-1, *[1] * (x.ndim - 1))


def _show(tensor: Tensor) -> str:
    values = [f"{v:g}" for v in tensor.flatten().tolist()]
    if len(set(values)) == 1:
        return values[0]
    return "(" + ", ".join(values) + ")"
