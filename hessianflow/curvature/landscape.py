"""The loss around the current weights, along given directions, and how the gradient lies to them.

Reference: Li, Xu, Taylor, Studer, Goldstein, Visualizing the loss landscape of neural nets, 2018,
section 4: filter normalisation scales each filter of a direction to the norm of the same filter of
the weights, and leaves out biases and batch-normalisation weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.vectors import check_vector, flatten, unflatten
from hessianflow.interfaces import HessianFlowError

Normalise = Literal["unit", "filter"]


@dataclass(frozen=True)
class LandscapeSlice:
    """Losses on a line or a plane through the weights.

    Attributes:
        offsets: distances along each direction, shape [points].
        losses: shape [points] for one direction, [points, points] for two (first direction: rows).
        normalise: how the directions were scaled.
    """

    offsets: Tensor
    losses: Tensor
    normalise: Normalise


def loss_landscape(
    operator: ModelOperator,
    directions: Tensor,
    *,
    span: float = 1.0,
    points: int = 21,
    normalise: Normalise = "unit",
) -> LandscapeSlice:
    """The loss at w + a d1 (+ b d2) for a, b from -span to span; the weights are as found
    afterwards, bit for bit.

    Args:
        operator: model, loss and data; its selected parameters are moved.
        directions: e.g. eigenvectors: shape [size], [size, 1] or [size, 2].
        span: largest offset, in units of the scaled directions.
        points: per direction.
        normalise: "unit" directions of length 1, "filter" as in Li et al.

    Raises:
        HessianFlowError: an argument out of range, a zero direction.
    """
    if normalise not in get_args(Normalise):
        raise HessianFlowError(
            f"normalise must be one of {', '.join(get_args(Normalise))}, got {normalise!r}"
        )
    if points < 1 or not span > 0:
        raise HessianFlowError(
            f"points must be at least 1 and span positive, got {points} and {span}"
        )
    columns = directions[:, None] if directions.ndim == 1 else directions
    if columns.ndim != 2 or columns.shape[1] not in (1, 2):
        raise HessianFlowError(
            "directions must have shape [size], [size, 1] or [size, 2], got"
            f" {list(directions.shape)}"
        )
    axes = [_scaled(operator, column.contiguous(), normalise) for column in columns.unbind(1)]
    offsets = torch.linspace(-span, span, points, dtype=torch.float64)
    with _weights_kept(operator) as weights:
        if len(axes) == 1:
            losses = [_loss_at(operator, weights, a * axes[0]) for a in offsets.tolist()]
        else:
            grid = [(a, b) for a in offsets.tolist() for b in offsets.tolist()]
            losses = [_loss_at(operator, weights, a * axes[0] + b * axes[1]) for a, b in grid]
    values = torch.tensor(losses, dtype=torch.float64).view((points,) * len(axes))
    return LandscapeSlice(offsets, values, normalise)


def gradient_overlap(operator: ModelOperator, vectors: Tensor) -> Tensor:
    """Share of the squared gradient along each column, (g^T v_i)^2 / ||g||^2, shape [k]; zeros for
    a zero gradient.

    With orthonormal columns the sum is the share of the gradient in their span (Gur-Ari, Roberts,
    Dyer, Gradient descent happens in a tiny subspace, 2018).
    """
    gradient = operator.gradient()
    squared: Tensor = (gradient @ vectors).square() / gradient.square().sum().clamp(
        min=torch.finfo(gradient.dtype).tiny
    )
    return squared


def _scaled(operator: ModelOperator, direction: Tensor, normalise: Normalise) -> Tensor:
    check_vector(operator, direction, "each direction")
    if normalise == "filter":
        pieces = unflatten(direction, operator.parameters)
        filters = [
            _filters_scaled(d, w.detach()) for d, w in zip(pieces, operator.parameters, strict=True)
        ]
        direction = flatten(filters, operator.parameters, operator.dtype)
    length = float(direction.norm())
    if length == 0:
        raise HessianFlowError(
            f"a direction is zero (normalise={normalise!r}); filter normalisation drops biases"
        )
    return direction if normalise == "filter" else direction / length


def _filters_scaled(direction: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim <= 1:
        return torch.zeros_like(direction)
    rows, targets = direction.reshape(len(direction), -1), weight.reshape(len(weight), -1)
    scale = targets.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp(
        min=torch.finfo(rows.dtype).tiny
    )
    scaled: Tensor = rows * scale
    return scaled.view_as(direction)


@contextmanager
def _weights_kept(operator: ModelOperator) -> Iterator[list[Tensor]]:
    saved = [p.detach().clone() for p in operator.parameters]
    operator.release()
    try:
        yield saved
    finally:
        with torch.no_grad():
            for parameter, value in zip(operator.parameters, saved, strict=True):
                parameter.copy_(value)


def _loss_at(operator: ModelOperator, weights: list[Tensor], offset: Tensor) -> float:
    with torch.no_grad():
        steps = unflatten(offset, operator.parameters)
        for parameter, value, step in zip(operator.parameters, weights, steps, strict=True):
            parameter.copy_(value + step)
    return operator.mean_loss()
