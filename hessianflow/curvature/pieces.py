"""What a forward pass over one batch or microbatch leaves for products, and which losses are
refused."""

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
        weight: what that mean divides by; where it is 0 nothing counts and the other fields mean
            nothing.
        product: multiplies the matrix of the piece with a vector.
        claims: makes what a difference can check.
        graph: facts read from the nodes of the graph.
        missing: indices of the selected parameters that have no gradient.
    """

    loss: Tensor
    weight: float
    product: Callable[[Tensor], Tensor]
    claims: Callable[[], Linearised] | None = None
    graph: Graph = Graph()
    missing: tuple[int, ...] = ()


class Kept(NamedTuple):
    """A graph for all products, and what it was built from.

    Attributes:
        recomputes: whether products run code of the model, and so need the modes and hooks that the
            graph was built under.
    """

    piece: Piece
    snapshot: Snapshot
    recomputes: bool


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that is not finite.

    Raises:
        NonFiniteError: with what to look at.
    """
    # One synchronisation per graph, so that no time is spent on products that are nan.
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteError(
            "the loss is not finite (nan or inf); look at the weights and the inputs"
        )


def counted(weight: float) -> float:
    """Return the weight, and refuse a weight of 0.

    Raises:
        HessianFlowError: it is 0.
    """
    if weight == 0:
        raise HessianFlowError(NO_TARGET)
    return weight
