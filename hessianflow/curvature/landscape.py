"""The loss around the current weights along some directions, and the gradient's share along them.

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

from hessianflow.checks import check_choice
from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.vectors import check_vector, flatten, unflatten
from hessianflow.interfaces import HessianFlowError

Normalise = Literal["unit", "filter"]


@dataclass(frozen=True)
class LandscapeSlice:
    """The losses on a line or a plane through the weights.

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
    """Return the loss at w + a d1 (+ b d2) for a, b from -span to span.

    The weights are put back afterwards, bit for bit.

    Args:
        operator: model, loss and data; its selected parameters are moved.
        directions: one or two directions, e.g. eigenvectors: shape [size], [size, 1] or [size, 2].
        span: largest offset, in units of the scaled directions.
        points: number of offsets along each direction.
        normalise: "unit" for directions of length 1, "filter" as in Li et al.

    Raises:
        HessianFlowError: an argument is out of range, or a direction is zero.
    """
    check_choice("normalise", normalise, get_args(Normalise))
    if points < 1 or not span > 0:
        raise HessianFlowError(
            f"points must be at least 1 and span positive, got {points} and {span}"
        )
    columns = directions
    if directions.ndim == 1:
        columns = directions[:, None]
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
    """Return the share of the squared gradient along each column, (g^T v_i)^2 / ||g||^2, shape [k].

    A zero gradient gives zeros. With orthonormal columns the sum is the share of the gradient in
    their span (Gur-Ari, Roberts, Dyer, Gradient descent happens in a tiny subspace, 2018).
    """
    gradient = operator.gradient()
    squared: Tensor = (gradient @ vectors).square() / gradient.square().sum().clamp(
        min=torch.finfo(gradient.dtype).tiny
    )
    return squared


def _scaled(operator: ModelOperator, direction: Tensor, normalise: Normalise) -> Tensor:
    check_vector(operator, direction, "each direction")
    if normalise == "filter":
        weights = operator.parameters
        pieces = zip(unflatten(direction, weights), weights, strict=True)
        filters = [_filters_scaled(piece, weight.detach()) for piece, weight in pieces]
        direction = flatten(filters, weights, operator.dtype)
    length = float(direction.norm())
    if length == 0:
        raise HessianFlowError(
            f"a direction is zero (normalise={normalise!r}); filter normalisation drops biases"
        )
    if normalise == "filter":
        return direction
    return direction / length


def _filters_scaled(direction: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim <= 1:
        return torch.zeros_like(direction)
    rows = direction.reshape(len(direction), -1)
    lengths = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    wanted = weight.reshape(len(weight), -1).norm(dim=1, keepdim=True)
    scaled: Tensor = rows * (wanted / lengths)
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
