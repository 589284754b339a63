"""Vectors of one length as the rows of a matrix that grows."""

import torch
from torch import Tensor

from hessianflow.interfaces import LinearOperator

BLOCK = 2**23
"""Numbers allocated at once, 32 MiB in float32. Ours: the rows of a network of 200,000 weights lie
in one block, where calls cost more than arithmetic, and those of a large one are allocated four at
a time."""


class Rows:
    """Rows kept in blocks: growing copies nothing, where one matrix would for a moment be held
    twice.

    Args:
        operator: whose size, type and device they have.
        most: how many rows are expected at most; no limit.

    Attributes:
        size: how many rows there are.
    """

    def __init__(self, operator: LinearOperator, most: int) -> None:
        self._height = min(most, max(4, BLOCK // operator.size))
        self._empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._blocks: list[Tensor] = []
        self.size = 0

    def append(self, row: Tensor) -> None:
        """Add a row, shape [n], behind the others."""
        block, place = divmod(self.size, self._height)
        if block == len(self._blocks):
            self._blocks.append(self._empty.new_empty(self._height, self._empty.shape[1]))
        self._blocks[block][place] = row
        self.size += 1

    def __getitem__(self, index: int) -> Tensor:
        """One row, a view."""
        return self._blocks[index // self._height][index % self._height]

    def dot(self, vector: Tensor) -> Tensor:
        """The inner products of all rows with a vector [n], shape [size]."""
        parts = [block @ vector for block in self._filled()]
        return torch.cat(parts) if parts else vector[:0]

    def combine(self, weights: Tensor) -> Tensor:
        """Linear combinations: weights [size] give a vector [n], weights [m, size] a matrix [m,
        n]."""
        first, *others = self._filled() or [self._empty]
        total: Tensor = weights[..., : len(first)] @ first
        done = len(first)
        for block in others:
            share = weights[..., done : done + len(block)]
            total.addmv_(block.T, share) if share.ndim == 1 else total.addmm_(share, block)
            done += len(block)
        return total

    def replace(self, weights: Tensor) -> None:
        """Put linear combinations of the rows, weights [m, size], m below the size, in place of all
        rows."""
        combined = self.combine(weights)
        self.size = 0
        for row in combined:
            self.append(row)

    def _filled(self) -> list[Tensor]:
        starts = range(0, self.size, self._height)
        return [
            block[: self.size - start] for start, block in zip(starts, self._blocks, strict=False)
        ]
