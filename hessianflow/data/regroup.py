"""Queues of examples that were read and not handed out yet, as single items or as rows of batches.

The batches may have any size.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article, entries, entry_names, is_list, is_plain, reading, rebuilt

Piece = tuple[int, Any]
"""A number of examples, and the batch that holds them."""


class Items:
    """A queue of single examples."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, _: int, items: list[Any]) -> None:
        """Append examples to the queue."""
        self._waiting.extend(items)

    def take(self, count: int) -> list[Any]:
        """Remove and return the first `count` examples."""
        return [self._waiting.popleft() for _ in range(count)]

    def put_back(self, taken: list[Any]) -> None:
        """Put the examples that were taken last back to the front."""
        self._waiting.extendleft(reversed(taken))

    def clear(self) -> None:
        """Drop all waiting examples."""
        self._waiting.clear()


class Rows:
    """A queue of batches from which any number of rows can be taken.

    Args:
        cut: cut(batch, rows, total) returns the rows in the slice `rows` of a batch of `total`.
    """

    def __init__(self, cut: Callable[[Any, slice, int], Any]) -> None:
        self._waiting: deque[Piece] = deque()
        self._count = 0
        self._cut = cut

    def __len__(self) -> int:
        return self._count

    def add(self, count: int, batch: Any) -> None:
        """Append a batch of `count` examples."""
        if count > 0:
            self._waiting.append((count, batch))
            self._count += count

    def take(self, count: int) -> list[Piece]:
        """Remove the first `count` examples, and return them in pieces."""
        taken: list[Piece] = []
        while count > 0:
            size, batch = self._waiting.popleft()
            self._count -= size
            if size > count:
                rest = self._cut(batch, slice(count, size), size)
                self._waiting.appendleft((size - count, rest))
                self._count += size - count
                batch = self._cut(batch, slice(0, count), size)
                size = count
            taken.append((size, batch))
            count -= size
        return taken

    def put_back(self, taken: list[Piece]) -> None:
        """Put the pieces that were taken last back to the front."""
        self._waiting.extendleft(reversed(taken))
        self._count += sum(size for size, _ in taken)

    def clear(self) -> None:
        """Drop all waiting examples."""
        self._waiting.clear()
        self._count = 0


def join(pieces: Sequence[Piece], name: str = "batch") -> Any:
    """Return one batch with the rows of all pieces, in order.

    Entries that belong to all examples (:mod:`hessianflow.batches`) must be the same in every
    piece.

    Raises:
        HessianFlowError: Entries differ in their type or in the dimensions of a row, or an entry
            that belongs to all examples differs in its value.
    """
    total, first = pieces[0]
    if len(pieces) == 1:
        return first
    parts = [part for _, part in pieces]
    if any(type(part) is not type(first) for part in parts):
        kinds = " and ".join(sorted({article(part) for part in parts}))
        raise HessianFlowError(
            f"{name} is {kinds}, so the batches cannot be joined: give it one type in all batches"
        )
    if isinstance(first, (Tensor, np.ndarray)) and all(reading(p, n) == "rows" for n, p in pieces):
        return _concatenated(parts, name)
    if is_plain(first) or isinstance(first, (Tensor, np.ndarray)):
        return _common(parts, name)
    has_entry_per_example = is_list(first) and len(first) == total
    if has_entry_per_example and not any(reading(e, total) == "rows" for e in first):
        return type(first)(entry for part in parts for entry in part)
    columns = [entries(part) for part in parts]
    if any(column is None or len(column) != len(columns[0] or ()) for column in columns):
        raise HessianFlowError(
            f"{name} is {article(first)}, whose rows are not known, so its batches cannot be"
            " joined: give tensors, arrays or a dict of them"
        )
    counts = [count for count, _ in pieces]
    values = [
        join(list(zip(counts, column, strict=True)), name + entry)
        for entry, column in zip(
            entry_names(first), zip(*(column or () for column in columns), strict=True), strict=True
        )
    ]
    return rebuilt(first, values)


def _concatenated(parts: Sequence[Any], name: str) -> Any:
    first = parts[0]
    other = next((part for part in parts if part.shape[1:] != first.shape[1:]), None)
    if other is not None:
        raise HessianFlowError(
            f"{name} has the shapes {list(first.shape)} and {list(other.shape)}, which cannot be"
            " joined: give single examples and a collate_fn that pads them, or pad all batches to"
            " one length"
        )
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return np.concatenate(list(parts))


def _common(parts: Sequence[Any], name: str) -> Any:
    """Return the value that all parts have in common."""
    first = parts[0]
    if not all(_equal(first, part) for part in parts[1:]):
        raise HessianFlowError(
            f"{name} has no row for each example and differs between batches, which cannot be"
            " joined: leave it out, or give single examples and a collate_fn"
        )
    return first


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def consumed(items: Iterator[Any], most: int) -> tuple[int, Any]:
    """Read at most `most` items and drop them; return their number and the last one."""
    count = 0
    last = None
    for item in islice(items, max(most, 0)):
        last = item
        count += 1
    return count, last
