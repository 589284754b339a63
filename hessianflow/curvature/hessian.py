"""Hessian-vector products by differentiating twice (Pearlmutter, Fast exact multiplication by the
Hessian, 1994).

H v = d(g(w)^T v)/dw, where the gradient g is computed with its graph. On one batch that graph is
kept, and a product is one more backward pass through it. On a ResNet-20 on a CPU core that costs
1.7 gradients, and 2.8 if the graph is rebuilt (2.65 and 3.7 with torch's own second derivatives,
which double_backward.py and ../normalisation/folded.py replace).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from hessianflow.curvature.derivatives import check_reached, inspect_graph
from hessianflow.curvature.differences import Linearised, Vectors
from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.pieces import Piece
from hessianflow.curvature.surroundings import full_precision
from hessianflow.curvature.vectors import flatten


class HessianOperator(ModelOperator):
    """The Hessian of the mean loss, H = d^2 L / dw^2, symmetric of shape [size, size].

    See :class:`~hessianflow.curvature.model_operator.ModelOperator` for arguments and errors.

    Example:
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> hessian = HessianOperator(model, nn.MSELoss(), (inputs, targets))
        >>> hessian @ torch.tensor([1.0, 1.0])  # the mean loss of two has the Hessian X^T X
        tensor([1., 4.])
    """

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Return sums over all weights; this process holds all weights."""
        return numbers

    def paired(self, batches: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
        """Return the batches, after checking that all ranks that measure together hold as many.

        This process measures alone, so there is nothing to check.
        """
        return batches

    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        loss, weight = self._checked_loss(model, batch)
        if weight == 0:
            return Piece(loss.detach(), 0.0, torch.zeros_like)
        graph = inspect_graph(loss)
        gradients = grad(loss, self.parameters, create_graph=True, allow_unused=True)
        check_reached(gradients)
        # One flat tensor with its graph: autograd, not Python, then cuts each vector into pieces.
        gradient = flatten(gradients, self.parameters, self.dtype)

        def product(vector: Tensor) -> Tensor:
            if not gradient.requires_grad:  # the gradient is constant: the Hessian is zero
                return torch.zeros_like(vector)
            second = grad(gradient, self.parameters, vector, retain_graph=True, allow_unused=True)
            return flatten(second, self.parameters, self.dtype)

        def along(vector: Tensor) -> tuple[Vectors, Vectors]:
            return [[gradient @ vector]], [torch.split(product(vector), sizes)]

        def claims() -> Linearised:
            values = torch.split(gradient.detach(), sizes)
            return Linearised(mean, [[mean]], [values], along, graph.rounds)

        mean = loss.detach()
        sizes = [parameter.numel() for parameter in self.parameters]
        missing = tuple(i for i, g in enumerate(gradients) if g is None)
        return Piece(mean, weight, product, claims, graph, missing, gradient.detach())

    def kept_gradient(self) -> Tensor:
        """Return the gradient, shape [size], from the graph that is kept for products.

        The next product then takes no other pass. Where no graph is kept (several batches or
        microbatches) it is computed by itself.
        """
        if self._can_keep and self._data.is_one_piece:
            with full_precision():
                gradient = self._kept_piece(self._data.single).piece.gradient
            if gradient is not None:
                return gradient
        return self.gradient()
