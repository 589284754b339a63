"""Products with a Jacobian and its transpose on a kept graph.

J^T u is linear in u, so the derivative of (J^T u)^T v by u is J v: no layer has to support forward
mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hessianflow.curvature.derivatives import check_reached
from hessianflow.curvature.vectors import flatten, unflatten


class KeptJacobian:
    """The Jacobian d outputs / d parameters of one graph, for any number of products.

    Flat vectors have the type `dtype`. The attribute `missing` holds the indices of parameters that
    the outputs do not depend on; HessianFlowError says that this is all of them.
    """

    def __init__(self, outputs: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._outputs = outputs
        self._parameters = parameters
        self._dtype = dtype
        self._dummy = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(
            outputs, parameters, self._dummy, create_graph=True, allow_unused=True
        )
        check_reached(transposed)
        self.missing = tuple(i for i, t in enumerate(transposed) if t is None)
        self._linear = [
            (i, t) for i, t in enumerate(transposed) if t is not None and t.requires_grad
        ]

    def forward(self, vector: Tensor) -> Tensor:
        """Return J v for a flat vector v, in the shape of the outputs."""
        if not self._linear:
            return torch.zeros_like(self._outputs)
        pieces = unflatten(vector, self._parameters)
        (product,) = torch.autograd.grad(
            [t for _, t in self._linear],
            self._dummy,
            [pieces[i] for i, _ in self._linear],
            retain_graph=True,
            materialize_grads=True,
        )
        return product

    def transposed(self, cotangent: Tensor) -> Tensor:
        """Return J^T u for a cotangent u in the shape of the outputs, as a flat vector."""
        grads = torch.autograd.grad(
            self._outputs, self._parameters, cotangent, retain_graph=True, allow_unused=True
        )
        return flatten(grads, self._parameters, self._dtype)
