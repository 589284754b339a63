"""The results of a forward pass over one batch or microbatch, and the losses that are refused."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hessianflow.curvature.derivatives import Graph
from hessianflow.curvature.differences import Linearised
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.curvature.staleness import Snapshot
from hessianflow.interfaces import HessianFlowError

NO_TARGET = "no target counts: all are ignored or of weight 0; look at ignore_index and weight"


class Piece(NamedTuple):
    """One forwarded batch or microbatch; where its weight is 0, other fields mean nothing."""

    loss: Tensor  # the mean loss, a detached scalar
    weight: float  # the divisor of that mean
    product: Callable[[Tensor], Tensor]  # multiplies the matrix of the piece with a vector
    claims: Callable[[], Linearised] | None = None  # returns what differences.py can check
    graph: Graph = Graph()
    missing: tuple[int, ...] = ()  # indices of the selected parameters that have no gradient
    gradient: Tensor | None = None  # the gradient, shape [size], where the graph holds it


class Kept(NamedTuple):
    """A graph that serves all products."""

    piece: Piece
    snapshot: Snapshot  # the weights, batch and options that it was built from
    recomputes: bool  # whether products run the model, and so need its modes and hooks of then


def check_finite(loss: Tensor) -> None:
    """Raise NonFiniteError if a loss is nan or infinite."""
    # One synchronisation per graph, so that no time is spent on products that are nan.
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteError(
            "the loss is not finite (nan or inf); look at the weights and the inputs"
        )


def counted(weight: float) -> float:
    """Return the weight; raise HessianFlowError if it is 0."""
    if weight == 0:
        raise HessianFlowError(NO_TARGET)
    return weight
