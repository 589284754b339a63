"""What happens in the processes that load: items by key, and how they travel.

Where the default collate makes batches, every entry has one row an example, so chunks are collated
where they are loaded and joined later: the batch is the same. Any other `collate_fn` must see all
items of a batch at once (to pad them to the longest, say), so the items themselves travel, with
their tensors in one piece of shared memory a chunk.
"""

import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from hessianflow.data.randomness import Randomness
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article, entries, is_list, rebuilt

Key = tuple[int, int]
"""(epoch, index): which example, and which of its random variations."""

ALIGNMENT = 16
"""Tensors in shared memory begin at multiples of so many bytes: every type can be read there."""


class ChunkPlan:
    """The batch sampler of the loader: the keys still to load, a chunk at a time."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.keys), self.chunk_size):
            yield self.keys[start : start + self.chunk_size]


class Failure:
    """An error of a worker that is one line for the user: torch would add a traceback to it."""

    def __init__(self, message: str) -> None:
        self.message = message


class SeededExamples(Dataset[Any]):
    """Items by (epoch, index), each loaded with random numbers of its own."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.randomness = Randomness(dataset)

    def __getitems__(self, keys: Sequence[Key]) -> list[Any] | Failure:
        """Return the items, in order; all generators are left as found."""
        items = []
        try:
            with self.randomness.kept():
                for epoch, index in keys:
                    self.randomness.seed(self.seed, "example", epoch, index)
                    items.append(self.dataset[index])
        except HessianFlowError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))
        return items


def start_worker(further: Callable[[int], None] | None, number: int) -> None:
    """Prepare a worker: of SIGTERM it takes notice only if its parent sends it.

    Whoever ends a job tells all its processes; a worker that went at once would leave the one that
    trains with an error in the place of a checkpoint.

    Args:
        further: what the user wants called.
        number: of the worker.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told, args=[os.getppid()], daemon=True).start()
    if further is not None:
        further(number)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def stacked(items: list[Any]) -> Any:
    """Return the batch that torch's default collate makes.

    Raises:
        HessianFlowError: items that it cannot stack.
    """
    try:
        return default_collate(items)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "equal size" in reason or "resize storage" in reason:  # the latter in a worker
            reason = "tensors or lists of different sizes"
        raise HessianFlowError(
            f"items such as {article(items[0])} cannot be stacked to a batch ({reason}): pass a"
            " collate_fn that pads or gathers them"
        ) from error


def stacked_chunk(items: list[Any] | Failure) -> tuple[int, Any] | Failure:
    """Return (number of items, their batch)."""
    if isinstance(items, Failure):
        return items
    try:
        return len(items), stacked(items)
    except HessianFlowError as error:
        if get_worker_info() is None:
            raise
        return Failure(str(error))


def kept_chunk(items: list[Any] | Failure) -> tuple[int, Any] | Failure:
    """Return (number of items, the items), in a form that travels well where this is a worker."""
    if isinstance(items, Failure):
        return items
    return len(items), items if get_worker_info() is None else Packed(items)


class Packed:
    """Any objects, with all plain tensors in them side by side in one.

    Each tensor sent by itself would take an open file of the process, of which there are few.
    """

    def __init__(self, items: Any) -> None:
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(items)
        self._pickled = stream.getvalue()
        self._places: list[tuple[int, torch.dtype, torch.Size]] = []
        size = 0
        for tensor in pickler.tensors:
            self._places.append((size, tensor.dtype, tensor.shape))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self._memory = torch.empty(size, dtype=torch.uint8)
        for place, tensor in zip(self._views(), pickler.tensors, strict=True):
            place.copy_(tensor)

    def unpacked(self) -> Any:
        """Return the objects; their tensors lie in the memory that was sent."""
        return _Unpickler(io.BytesIO(self._pickled), list(self._views())).load()

    def _views(self) -> Iterator[Tensor]:
        for start, dtype, shape in self._places:
            stop = start + shape.numel() * dtype.itemsize
            yield self._memory[start:stop].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Leaves plain tensors out, and collects them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, part: Any) -> int | None:
        if type(part) is not Tensor or part.layout != torch.strided or part.device.type != "cpu":
            return None
        if part.requires_grad or part.is_quantized or part.is_conj() or part.is_neg():
            return None
        self.tensors.append(part)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def rows_of(stack: Any, rows: slice) -> Any:
    """Return some examples of what the default collate made: all in it has one row or entry an
    example.

    Raises:
        HessianFlowError: an entry of a type that torch does not stack by itself.
    """
    if isinstance(stack, Tensor) or _is_text(stack):
        return stack[rows]
    parts = [e[rows] if isinstance(e, Tensor) else rows_of(e, rows) for e in _opened(stack)]
    return rebuilt(stack, parts)


def joined(stacks: list[Any]) -> Any:
    """Return one batch joined from several that the default collate made.

    Raises:
        HessianFlowError: as :func:`rows_of`.
    """
    first = stacks[0]
    if len(stacks) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(stacks)
    if _is_text(first):
        return type(first)(text for stack in stacks for text in stack)
    columns = zip(*map(_opened, stacks), strict=True)
    return rebuilt(first, [joined(list(column)) for column in columns])


def _is_text(stack: Any) -> bool:
    return is_list(stack) and bool(stack) and isinstance(stack[0], (str, bytes))


def _opened(stack: Any) -> list[Any]:
    if type(stack) is list:
        return stack
    values = entries(stack)
    if values is None or not isinstance(stack, (Mapping, tuple)):
        raise HessianFlowError(
            f"the default collate made {article(stack)}, which cannot be cut into batches: leave it"
            " out in the data set, or pass a collate_fn"
        )
    return values
