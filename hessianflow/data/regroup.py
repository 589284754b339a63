"""Examples that were read and not handed out yet: single ones, or rows of batches of any size."""

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
        """Put what was taken last to the front again."""
        self._waiting.extendleft(reversed(taken))

    def clear(self) -> None:
        """Drop all examples that wait."""
        self._waiting.clear()


class Rows:
    """A queue of batches from which any number of rows can be taken.

    Args:
        cut: Function of a batch, a slice of its rows and their number that returns the rows.
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
        """Put what was taken last to the front again."""
        self._waiting.extendleft(reversed(taken))
        self._count += sum(size for size, _ in taken)

    def clear(self) -> None:
        """Drop all examples that wait."""
        self._waiting.clear()
        self._count = 0


def join(pieces: Sequence[Piece], name: str = "batch") -> Any:
    """Return one batch with the rows of all pieces, in order.

    What belongs to all examples (:mod:`hessianflow.batches`) must be the same in every piece.

    Raises:
        HessianFlowError: Entries differ in their type, their further dimensions, or, where they
            belong to all examples, in their value.
    """
    total, first = pieces[0]
    if len(pieces) == 1:
        return first
    parts = [part for _, part in pieces]
    if any(type(part) is not type(first) for part in parts):
        kinds = " and ".join(sorted({article(part) for part in parts}))
        raise HessianFlowError(f"{name} is {kinds} in batches that are to be joined")
    if isinstance(first, (Tensor, np.ndarray)) and all(reading(p, n) == "rows" for n, p in pieces):
        return _concatenated(parts, name)
    if is_plain(first) or isinstance(first, (Tensor, np.ndarray)):
        return _common(parts, name)
    has_one_an_example = len(first) == total if is_list(first) else False
    if has_one_an_example and not any(reading(e, total) == "rows" for e in first):
        return type(first)(entry for part in parts for entry in part)
    columns = [entries(part) for part in parts]
    if any(column is None or len(column) != len(columns[0] or ()) for column in columns):
        raise HessianFlowError(
            f"{name} is {article(first)}, whose rows are not known: batches of it cannot be joined"
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
            f"{name} of shapes {list(first.shape)} and {list(other.shape)} cannot be joined: give"
            " single examples and a collate_fn that pads them, or pad all batches to one length"
        )
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return np.concatenate(list(parts))


def _common(parts: Sequence[Any], name: str) -> Any:
    """Return what all parts have in common."""
    first = parts[0]
    if not all(_equal(first, part) for part in parts[1:]):
        raise HessianFlowError(
            f"{name} has no row for each example and differs between batches: they cannot be"
            " joined; leave it out, or give single examples and a collate_fn"
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
