"""Symmetric matrices known by their products: size, device, dtype and matvec.

The algebra here (sum, scale, shift, deflation, adapter) needs nothing but products. Each estimator
can therefore be tested on a plain matrix, and the operators of models can be combined.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessianflow.curvature.vectors import check_vector, estimating
from hessianflow.interfaces import HessianFlowError

ORTHONORMAL = 1e-3  # largest entry of Q^T Q - I that is put down to rounding; our choice


class NonFiniteError(HessianFlowError):
    """A loss or a product is nan or infinite."""


NON_FINITE_PRODUCT = (
    "a product with the operator is not finite (nan or inf); look at the weights and the data, and"
    " for an operation without a second derivative there, such as a norm, a root or a power at 0"
)


class Operator(ABC):
    """A symmetric matrix known by its products.

    Subclasses set `size` (rows), `device` and `dtype` (of the vectors) and give `_product`.
    """

    size: int
    device: torch.device
    dtype: torch.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a flat vector, shape [size]; the vector is not changed.

        The product may be infinite or nan; `operator @ vector` refuses it then.

        Raises:
            HessianFlowError: the vector has another shape, type or device.
        """
        check_vector(self, vector)
        return self._product(vector)

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor:
        """Return the product with a vector that is known to fit."""

    def release(self) -> None:  # noqa: B027
        """Free whatever is kept between products (a graph); the next product makes it again."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return `operator @ v` for a vector [size], or column by column for a matrix [size, k].

        Raises:
            HessianFlowError: as :meth:`matvec`, or (NonFiniteError) product or vector are not
                finite.
        """
        if other.ndim != 2:
            return self._finite_product(other)
        if other.shape[1] == 0:
            return other.clone()
        products = [self._finite_product(column.contiguous()) for column in other.unbind(1)]
        return torch.stack(products, dim=1)

    def _finite_product(self, vector: Tensor) -> Tensor:
        product = self.matvec(vector)
        # This waits for the device. Searches call matvec and look at the numbers that they fetch in
        # any case. One number shows most faults, but it may overflow where no entry does: it only
        # says when to look at all entries.
        looks_finite = math.isfinite(torch.dot(product, vector).item())
        if not looks_finite and not bool(torch.isfinite(product).all()):
            if not bool(torch.isfinite(vector).all()):
                raise NonFiniteError("the vector is not finite (nan or inf), nor is its product")
            raise NonFiniteError(NON_FINITE_PRODUCT)
        return product

    def __add__(self, other: "Operator") -> "Operator":
        _check_addable(self, other)
        return _DerivedOperator(lambda v: self.matvec(v) + other.matvec(v), self, other)

    def __mul__(self, factor: float) -> "Operator":
        return _DerivedOperator(lambda v: self.matvec(v) * factor, self)

    __rmul__ = __mul__

    def __neg__(self) -> "Operator":
        return self * -1.0

    def __sub__(self, other: "Operator") -> "Operator":
        return self + -other

    def shifted(self, shift: float) -> "Operator":
        """Return A + shift I."""
        return _DerivedOperator(lambda v: torch.add(self.matvec(v), v, alpha=shift), self)

    def deflated(self, vectors: Tensor) -> "Operator":
        """Return (I - Q Q^T) A (I - Q Q^T), for orthonormal columns Q of shape [size, m]."""
        _check_orthonormal(self, vectors)

        def outside(vector: Tensor) -> Tensor:
            return vector - vectors @ (vectors.T @ vector)

        return _DerivedOperator(lambda v: outside(self.matvec(outside(v))), self)

    def dense(self) -> Tensor:
        """Return the whole matrix, shape [size, size], by `size` products: for small problems."""
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` over NumPy vectors, e.g. for `eigsh`."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(vector: Any) -> Any:
            flat = torch.as_tensor(vector.reshape(-1)).to(self.device, self.dtype)
            return (self @ flat).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return ScipyOperator((self.size, self.size), matvec=product, rmatvec=product, dtype=dtype)


class CallableOperator(Operator):
    """An operator from any function that multiplies a symmetric matrix with a flat vector.

    Args:
        matvec: maps a vector [size] to a vector [size].
        size: number of rows, at least 1.
        dtype: floating-point type of the vectors.
        device: device of the vectors.

    Raises:
        HessianFlowError: `size` or `dtype` is no such; at a product: another shape or type results.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise HessianFlowError(f"size must be at least 1, got {size}")
        if not dtype.is_floating_point:
            raise HessianFlowError(
                f"dtype must be a floating-point type, got {dtype}; hold complex ones as"
                " view_as_real"
            )
        self._function = matvec
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)

    def _product(self, vector: Tensor) -> Tensor:
        product = self._function(vector)
        if product.shape != vector.shape:
            raise HessianFlowError(
                f"matvec must return shape [{self.size}], got {list(product.shape)}"
            )
        if product.dtype != self.dtype:
            raise HessianFlowError(
                f"matvec must return {self.dtype}, the type of its vectors, got {product.dtype}; "
                f"pass dtype={product.dtype}"
            )
        return product


class _DerivedOperator(Operator):
    """An operator whose products are made from those of others with the same vectors."""

    def __init__(self, product: Callable[[Tensor], Tensor], *bases: Operator) -> None:
        self._function = product
        self._bases = bases
        self.size = bases[0].size
        self.device = bases[0].device
        self.dtype = bases[0].dtype

    def release(self) -> None:
        """Free what the other operators keep."""
        for base in self._bases:
            base.release()

    def _product(self, vector: Tensor) -> Tensor:
        return self._function(vector)


def _check_addable(first: Operator, second: Operator) -> None:
    if not isinstance(second, Operator):
        raise HessianFlowError(
            f"only an operator can be added to an operator, got {type(second).__name__}; for A"
            " + c I: A.shifted(c)"
        )
    if first.size != second.size:
        raise HessianFlowError(
            f"operators to be added must have one size, got {first.size} and {second.size}"
        )
    if (first.dtype, first.device) != (second.dtype, second.device):
        raise HessianFlowError(
            f"operators to be added must have vectors of one type and device, got {first.dtype}"
            f" on {first.device} and {second.dtype} on {second.device}"
        )


def _check_orthonormal(operator: Operator, vectors: Tensor) -> None:
    if vectors.ndim != 2 or vectors.shape[0] != operator.size:
        raise HessianFlowError(
            f"vectors must have shape [{operator.size}, m], got {list(vectors.shape)}; pass"
            " orthonormal columns"
        )
    if (vectors.dtype, vectors.device.type) != (operator.dtype, operator.device.type):
        raise HessianFlowError(
            f"vectors must be {operator.dtype} on {operator.device}, got {vectors.dtype} on"
            f" {vectors.device}"
        )
    error = 0.0
    if vectors.numel():
        with estimating(operator):
            unit = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
            # This waits for the device once for each operator made: columns that are not
            # orthonormal would scale the matrix without an error.
            error = float((vectors.T @ vectors - unit).abs().max())
    if not error <= ORTHONORMAL:
        raise HessianFlowError(
            f"vectors must be orthonormal columns, but Q^T Q is off by {error:.2g} from the"
            " identity; pass torch.linalg.qr(vectors).Q"
        )
