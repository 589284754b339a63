"""The generalized Gauss-Newton matrix (Schraudolph, Fast curvature matrix-vector products, 2002).

G = 1/N sum_n J_n^T (d^2 loss / d f^2) J_n, with J_n the Jacobian of the outputs, is the Hessian
without the curvature of the network itself. It is positive semi-definite for a convex loss, and for
the cross-entropy it equals the Fisher information.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from hessianflow.batches import is_pair
from hessianflow.curvature.derivatives import check_reached, inspect_graph
from hessianflow.curvature.differences import Linearised, Vectors
from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.pieces import Piece, check_finite
from hessianflow.curvature.vectors import flatten, unflatten
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses import Forwarded
from hessianflow.losses.model_loss import logits_of
from hessianflow.structure import article


class PairOperator(ModelOperator):
    """A matrix that needs the loss and the network separately, and outputs of a single tensor."""

    def _run(self, model: nn.Module, batch: Any) -> Forwarded:
        if self._loss.mean.is_known and not is_pair(batch):
            raise self._without_outputs(batch)
        if self._loss.takes_pair(batch):
            made = model(batch[0])
            # Checked first, because a loss may fail on outputs that are not a tensor.
            self._check_outputs(logits_of(made))
            return self._loss.of_outputs(made, batch[1])
        forwarded = self._loss(model, batch)
        if forwarded.outputs is None:
            raise self._without_outputs(batch)
        self._check_outputs(forwarded.outputs)
        return forwarded

    def _without_outputs(self, batch: Any) -> HessianFlowError:
        return HessianFlowError(
            f"{type(self).__name__} needs pairs (inputs, targets), got {article(batch)} whose loss"
            " returns no outputs: let the loss return an object with loss and logits, as models of"
            " transformers do, or select the outputs with hf.ModelLoss(function, outputs=...)"
        )

    def _check_outputs(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise HessianFlowError(
                f"{type(self).__name__} needs a model that returns one tensor depending on the"
                f" selected parameters, got {type(outputs).__name__}; wrap the model"
            )


class GGNOperator(PairOperator):
    """The generalized Gauss-Newton matrix of the mean loss.

    Arguments and attributes: see :class:`~hessianflow.curvature.model_operator.ModelOperator`. The
    outputs must be a single tensor that the loss depends on. For a pair, they are the result of the
    model or its `logits`; a loss that runs the model returns them beside the loss.
    """

    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        forwarded = self._forwarded(model, batch)
        averaged = forwarded.averaged
        outputs: Tensor = forwarded.outputs
        loss = averaged.value
        weight = float(averaged.weight)
        if weight == 0:
            return Piece(loss.detach(), 0.0, torch.zeros_like)
        check_finite(loss)
        graph = inspect_graph(loss)
        (slope,) = grad(loss, outputs, create_graph=True, allow_unused=True)
        check_reached([slope])
        jacobian = KeptJacobian(outputs, self.parameters, self.dtype)

        def curved(moved: Tensor) -> Tensor:
            if not slope.requires_grad:  # a loss that is linear in the outputs has no curvature
                return torch.zeros_like(moved)
            return grad(slope, outputs, moved, retain_graph=True, materialize_grads=True)[0]

        def product(vector: Tensor) -> Tensor:
            return jacobian.transposed(curved(jacobian.forward(vector)))

        def along(vector: Tensor) -> tuple[Vectors, Vectors]:
            moved = jacobian.forward(vector)
            return [[jacobian.transposed(slope) @ vector], [moved], [curved(moved)]], []

        def claims() -> Linearised:
            values: Vectors = [[mean], [outputs.detach()], [slope.detach()]]
            return Linearised(mean, values, [], along, graph.rounds)

        mean = loss.detach()
        return Piece(mean, weight, product, claims, graph, jacobian.missing)


class KeptJacobian:
    """The Jacobian J = d outputs / d parameters of one graph, for any number of products.

    J^T u is linear in u, so the derivative of (J^T u)^T v by u is J v: no layer has to support
    forward mode. Flat vectors have the type `dtype`. The attribute `missing` holds the indices of
    parameters that the outputs do not depend on; if these are all, HessianFlowError is raised.
    """

    def __init__(self, outputs: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._outputs = outputs
        self._parameters = parameters
        self._dtype = dtype
        self._dummy = torch.zeros_like(outputs, requires_grad=True)
        transposed = grad(outputs, parameters, self._dummy, create_graph=True, allow_unused=True)
        check_reached(transposed)
        self.missing = tuple(i for i, t in enumerate(transposed) if t is None)
        reached = [(i, t) for i, t in enumerate(transposed) if t is not None]
        self._linear = [(i, t) for i, t in reached if t.requires_grad]

    def forward(self, vector: Tensor) -> Tensor:
        """Return J v for a flat vector v, in the shape of the outputs."""
        if not self._linear:
            return torch.zeros_like(self._outputs)
        pieces = unflatten(vector, self._parameters)
        rows = [t for _, t in self._linear]
        along = [pieces[i] for i, _ in self._linear]
        return grad(rows, self._dummy, along, retain_graph=True, materialize_grads=True)[0]

    def transposed(self, cotangent: Tensor) -> Tensor:
        """Return J^T u for a cotangent u in the shape of the outputs, as a flat vector."""
        grads = grad(
            self._outputs, self._parameters, cotangent, retain_graph=True, allow_unused=True
        )
        return flatten(grads, self._parameters, self._dtype)
