"""The Hessian in the geometry of an optimizer: P^-1/2 (H + b I) P^-1/2.

It is symmetric and has the eigenvalues of P^-1 (H + b I), which decide where the optimizer's steps
are stable; b is the weight decay that the optimizer adds to the gradient.
"""

from collections.abc import Sequence

from torch import Tensor

from hessianflow.curvature.geometry import OptimizerGeometry
from hessianflow.curvature.operator import Operator
from hessianflow.curvature.vectors import check_vector
from hessianflow.interfaces import HessianFlowError, LinearOperator


class PreconditionedOperator(Operator):
    """A matrix of the weights as an optimizer sees it.

    Args:
        operator: the Hessian, or another matrix of the weights.
        geometry: of the optimizer that steps them, with a preconditioner.
        parameters: the parameters in the order of the operator's vectors; None for those of the
            operator or, if it has none, of the optimizer.

    Raises:
        HessianFlowError: the geometry has no preconditioner, or the parameters have another number
            of weights than the operator.

    Example:
        >>> import torch
        >>> from hessianflow.curvature import CallableOperator, optimizer_geometry, top_eigenpairs
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> adam = torch.optim.Adam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([10.0, 1.0])
        >>> adam.step()  # P is now diag(10, 1)
        >>> hessian = CallableOperator(lambda v: torch.tensor([20.0, 3.0]) * v, 2)
        >>> seen = PreconditionedOperator(hessian, optimizer_geometry(adam))
        >>> top_eigenpairs(seen, which="LA", seed=0).values
        tensor([3.0000])
    """

    def __init__(
        self,
        operator: LinearOperator,
        geometry: OptimizerGeometry,
        parameters: Sequence[Tensor] | None = None,
    ) -> None:
        if not geometry.linear:
            raise HessianFlowError(f"{geometry.note}; use critical_rate")
        if parameters is None:
            parameters = getattr(operator, "parameters", geometry.parameters)
        count = sum(parameter.numel() for parameter in parameters)
        if count != operator.size:
            raise HessianFlowError(
                f"the operator has {operator.size} rows, but the parameters have {count} weights;"
                " pass those of its vectors as parameters"
            )
        self._base = operator
        self.size = operator.size
        self.device = operator.device
        self.dtype = operator.dtype
        self._root = geometry.inverse_root(parameters, operator.dtype)
        self._decay = geometry.decay(parameters, operator.dtype)

    @property
    def shift(self) -> float | None:
        """Return b if the matrix is H + b I, whose eigenvalues are those of H plus b; else None."""
        if self._root is None and not isinstance(self._decay, Tensor):
            return self._decay
        return None

    def _product(self, vector: Tensor) -> Tensor:
        inner = self._scaled(vector)
        product = self._base.matvec(inner)
        if isinstance(self._decay, Tensor) or self._decay:
            product = product + self._decay * inner
        return self._scaled(product)

    def _scaled(self, vector: Tensor) -> Tensor:
        if self._root is None:
            return vector
        return vector * self._root

    def to_weights(self, vector: Tensor) -> Tensor:
        """Return P^-1/2 v: an eigenvector of P^-1 (H + b I), if v is one of this operator.

        Raises:
            HessianFlowError: the vector has another shape, type or device.
        """
        check_vector(self, vector)
        return self._scaled(vector)

    def release(self) -> None:
        """Free what the matrix keeps between products."""
        if isinstance(self._base, Operator):
            self._base.release()
