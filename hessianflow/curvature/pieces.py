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
    """One forwarded batch or microbatch.

    Attributes:
        loss: the mean loss of the piece, a detached scalar.
        weight: the divisor of that mean; where it is 0, no target counts and the other fields mean
            nothing.
        product: multiplies the matrix of the piece with a vector.
        claims: returns what differences.py can check.
        graph: facts read from the nodes of the graph.
        missing: indices of the selected parameters that have no gradient.
        gradient: the gradient, shape [size], where the graph holds it.
    """

    loss: Tensor
    weight: float
    product: Callable[[Tensor], Tensor]
    claims: Callable[[], Linearised] | None = None
    graph: Graph = Graph()
    missing: tuple[int, ...] = ()
    gradient: Tensor | None = None


class Kept(NamedTuple):
    """A graph that serves all products.

    Attributes:
        piece: the results of the forward pass that built it.
        snapshot: the weights, batch and options that it was built from.
        recomputes: whether products run code of the model, and so need the modes and hooks under
            which the graph was built.
    """

    piece: Piece
    snapshot: Snapshot
    recomputes: bool


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that is not finite.

    Raises:
        NonFiniteError: the loss is nan or infinite.
    """
    # One synchronisation per graph, so that no time is spent on products that are nan.
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteError(
            "the loss is not finite (nan or inf); look at the weights and the inputs"
        )


def counted(weight: float) -> float:
    """Return the weight, and refuse a weight of 0.

    Raises:
        HessianFlowError: the weight is 0.
    """
    if weight == 0:
        raise HessianFlowError(NO_TARGET)
    return weight
