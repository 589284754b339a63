"""What an attack may do to an input: how far it may move it, and within which valid range of
values.

Perturbations are measured in units of eps: delta = eps * u with u in the unit ball of the norm, so
that a value per channel (eps / std for inputs normalised by std) needs no code of its own, also in
l_2.
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

# Inputs may leave the stated range by this part of its width: rounding of half-precision normalised
# images.
RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class Budget:
    """The ball |delta| <= eps in `norm`, cut by the valid range.

    Attributes:
        eps: radius, shape [] or [channels]; after :func:`place`, broadcastable to the inputs.
        low: smallest valid value, shaped like eps; None: unbounded.
        high: largest valid value, shaped like eps; None: unbounded.
        norm: "l_inf" or "l_2" (over all components of one example).
    """

    eps: Tensor
    low: Tensor | None
    high: Tensor | None
    norm: Norm

    def clamp(self, x: Tensor) -> Tensor:
        """Return the nearest inputs in the valid range."""
        return x if self.low is None else torch.clamp(x, self.low, self.high)

    def project(self, perturbed: Tensor, x: Tensor) -> Tensor:
        """Back into the ball around `x`, then into the valid range (which contains `x`, so the ball
        is kept)."""
        if self.norm == "l_inf":
            return self.clamp(torch.clamp(perturbed, x - self.eps, x + self.eps))
        delta = perturbed - x
        return self.clamp(x + delta / self.length(delta).clamp(min=1.0))

    def length(self, delta: Tensor) -> Tensor:
        """Return the l_2 norm of delta / eps for each example, shape [N, 1, ...]; channels with eps
        = 0 count as unmoved."""
        u = torch.where(self.eps > 0, delta / self.eps, torch.zeros_like(delta))
        return _row_norm(u)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Return the delta of length eps along which a linear function with this gradient grows
        most."""
        if self.norm == "l_inf":
            return self.eps * gradient.sign()
        scaled = self.eps * gradient
        norm = _row_norm(scaled)
        # A zero gradient names no direction: such an example stays where it is.
        return self.eps * torch.where(norm > 0, scaled / norm, torch.zeros_like(scaled))

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Uniformly distributed deltas from the ball, shaped like `x`."""
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
    """Check and resolve what the user gave.

    Raises:
        HessianFlowError: eps negative, not finite or larger than the width of the range; an empty
            range; an unknown norm.
    """
    if norm not in ("l_inf", "l_2"):
        raise HessianFlowError(f"norm must be 'l_inf' or 'l_2', got {norm!r}")
    radius = _as_tensor(eps, "eps")
    if not bool(torch.isfinite(radius).all() and (radius >= 0).all()):
        raise HessianFlowError(f"eps must be finite and at least 0, got {_show(radius)}")
    if value_range is None:
        return Budget(radius, None, None, norm)
    low, high = _range(value_range)
    radius, low, high = _broadcast(radius, low, high)
    # In l_2 eps bounds the length of the whole perturbation, which may exceed the range of one
    # component.
    if norm == "l_inf" and bool((radius > high - low).any()):
        raise HessianFlowError(
            f"eps must not exceed the width {_show(high - low)} of value_range, got"
            f" {_show(radius)}; state it in the units of the inputs (divide by the std for"
            " normalised ones)"
        )
    return Budget(radius, low, high, norm)


def check_one_tensor(value: object, name: str = "inputs", purpose: str = "to be perturbed") -> None:
    """Refuse inputs in a structure: nothing says which tensor is to be perturbed, and how far.

    Args:
        value: the inputs, or something else that has a `name` and must be a tensor for another
            `purpose`.
        name: for the message.
        purpose: likewise.

    Raises:
        HessianFlowError: anything but a tensor.
    """
    if not isinstance(value, Tensor):
        raise HessianFlowError(f"{name} must be one tensor {purpose}, got {article(value)}")


def place(budget: Budget, x: Tensor) -> Budget:
    """Return the budget on the device and in the precision of `x`, shaped to broadcast over its
    channels.

    Raises:
        HessianFlowError: inputs that are not one tensor of floating point numbers, or a number of
            channels that differs from that of eps or value_range.
    """
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
        shape = (1, -1, *[1] * (x.ndim - 2)) if value.ndim else ()
        return value.to(device=x.device, dtype=x.dtype, non_blocking=True).reshape(shape)

    eps = shaped(budget.eps)
    assert eps is not None
    return Budget(eps, shaped(budget.low), shaped(budget.high), budget.norm)


def check_in_range(budget: Budget, x: Tensor) -> None:
    """Refuse inputs outside the stated valid range: clamping would change them beyond recognition.

    Waits for the device, so training checks its first batch only.

    Raises:
        HessianFlowError: a value lies outside `value_range` by more than rounding.
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
    low, high = _as_tensor(value_range[0], "value_range"), _as_tensor(value_range[1], "value_range")
    low, high = _broadcast(low, high)
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
    return values[0] if len(set(values)) == 1 else "(" + ", ".join(values) + ")"
