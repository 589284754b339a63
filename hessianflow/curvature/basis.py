"""A matrix that grows by rows, for vectors of one length."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError, LinearOperator

BLOCK = 2**23
"""Numbers allocated at once, 32 MiB in float32. Our choice: the rows of a network of 200,000
weights lie in one block, because there calls cost more than arithmetic; those of a large network
are allocated four at a time."""

ASYMMETRY = 0.1
"""Relative difference of V^T A V from its transpose that is put down to rounding. Our choice:
products in bfloat16 differ by a hundredth."""


class Rows:
    """Rows kept in blocks, so that growing copies nothing; a single matrix would be held twice.

    The rows have length, type and device of `operator`. `most` is the number expected, but no
    limit; the attribute `size` is the number there is.
    """

    def __init__(self, operator: LinearOperator, most: int) -> None:
        self._height = min(most, max(4, BLOCK // operator.size))
        self._empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._blocks: list[Tensor] = []
        self.size = 0

    def append(self, row: Tensor) -> None:
        """Add a row, shape [n], after the last."""
        block, index = divmod(self.size, self._height)
        if block == len(self._blocks):
            self._blocks.append(self._empty.new_empty(self._height, self._empty.shape[1]))
        self._blocks[block][index] = row
        self.size += 1

    def __getitem__(self, index: int) -> Tensor:
        """Return one row as a view."""
        return self._blocks[index // self._height][index % self._height]

    def dot(self, vector: Tensor) -> Tensor:
        """Return the inner products of all rows with a vector [n], shape [size]."""
        products = [block @ vector for block in self._filled()]
        if not products:
            return vector[:0]
        return torch.cat(products)

    def combine(self, weights: Tensor) -> Tensor:
        """Return combinations of the rows: [n] for weights [size], [m, n] for weights [m, size]."""
        first, *others = self._filled() or [self._empty]
        total: Tensor = weights[..., : len(first)] @ first
        done = len(first)
        for block in others:
            of_block = weights[..., done : done + len(block)]
            if of_block.ndim == 1:
                total.addmv_(block.T, of_block)
            else:
                total.addmm_(of_block, block)
            done += len(block)
        return total

    def replace(self, weights: Tensor) -> None:
        """Replace all rows by m < size combinations of them, weights [m, size]."""
        combined = self.combine(weights)
        self.size = 0
        for row in combined:
            self.append(row)

    def _filled(self) -> list[Tensor]:
        starts = range(0, self.size, self._height)
        return [block[: self.size - i] for i, block in zip(starts, self._blocks, strict=False)]


def norms_of(rows: Tensor) -> npt.NDArray[np.float64]:
    """Return the Euclidean norms of some rows, on the host."""
    norms: npt.NDArray[np.float64] = torch.linalg.vector_norm(rows, dim=1).cpu().double().numpy()
    return norms


def orthogonal_part(direction: Tensor, basis: Rows) -> Tensor | None:
    """Return the unit vector along `direction` outside orthonormal rows; None if they span it."""
    unit: Tensor = direction / direction.norm()
    for _ in range(3):
        unit = unit - basis.combine(basis.dot(unit))
        remainder = unit.norm()
        unit = unit / remainder
        # The host waits here for a number on which the loop depends. "Twice is enough" (Kahan):
        # where nothing cancelled, no further round is needed.
        left = float(remainder)
        if not left > 10 * torch.finfo(unit.dtype).eps:
            return None
        if left > 0.7:
            break
    return unit


def check_symmetric(basis: Rows, products: Rows) -> None:
    """Raise HessianFlowError if u^T A v and v^T A u differ by more than ASYMMETRY of their size.

    The vectors u and v are the rows of `basis`, and `products` holds A v for each of them.
    """
    projected = torch.stack([basis.dot(products[index]) for index in range(basis.size)])
    difference = float((projected - projected.T).norm())
    relative = difference / max(float(projected.norm()), torch.finfo(projected.dtype).tiny)
    if relative > ASYMMETRY:
        raise HessianFlowError(
            f"the operator is not symmetric: u.(A v) and v.(A u) differ by {relative:.0%} of their"
            " size on the vectors of the search; pass a symmetric one, such as (A + A^T) / 2, and"
            " of a model look for an operation whose second derivative overflows or is wrong"
            " (check_product=True)"
        )
