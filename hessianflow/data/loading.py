"""Load items by key in worker processes, and send them to the process that trains.

Where the default collate makes batches, every entry has one row per example, so chunks are collated
where they are loaded and joined later: the batch is the same. Any other `collate_fn` must see all
items of a batch at once (for example, to pad them to the longest), so the items themselves are
sent, with the tensors of a chunk in one piece of shared memory.
"""

import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from hessianflow.data.randomness import Randomness
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article, entries, is_list, rebuilt

Key = tuple[int, int]
"""Pair (epoch, index), which names an example and one of its random variations."""

ALIGNMENT = 16
"""Tensors in shared memory begin at multiples of this number of bytes, which suits every type."""


class SeededExamples(Dataset[Any]):
    """The items of a data set by (epoch, index), each loaded with random numbers of its own.

    A worker sends its error instead of items: torch would add a traceback to one that is raised.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.randomness = Randomness(dataset)

    def __getitems__(self, keys: Sequence[Key]) -> list[Any] | HessianFlowError:
        """Return the items in order, and restore all generators."""
        items = []
        try:
            with self.randomness.kept():
                for epoch, index in keys:
                    self.randomness.seed(self.seed, "example", epoch, index)
                    items.append(self.dataset[index])
        except HessianFlowError as error:
            if get_worker_info() is None:
                raise
            return HessianFlowError(str(error))
        return items


def start_worker(further: Callable[[int], None] | None, number: int) -> None:
    """Prepare a worker, which from then on obeys SIGTERM only if its parent sends it.

    A scheduler that ends a job signals all its processes. A worker that ended at once would leave
    the process that trains with an error instead of a checkpoint. `further` is the user's
    `worker_init_fn`.
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
    """Return what torch's default collate makes of the items, and refuse what it cannot stack."""
    try:
        return default_collate(items)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "equal size" in reason or "resize storage" in reason:  # the latter in a worker
            reason = unequal_sizes(items) or "tensors or lists of different sizes"
        raise HessianFlowError(
            f"items such as {article(items[0])} cannot be stacked to a batch ({reason}): pass a"
            " collate_fn that pads or gathers them"
        ) from error


def unequal_sizes(items: Sequence[Any]) -> str:
    """Describe the first shapes, or lengths of lists, that differ between items; "" if none do."""
    first = items[0]
    if isinstance(first, (Tensor, np.ndarray)):
        other = next((item for item in items if item.shape != first.shape), first)
        if other is first:
            return ""
        return f"tensors of different sizes, {list(first.shape)} and {list(other.shape)}"
    columns = [entries(item) for item in items]
    lengths = {len(column) for column in columns if column is not None}
    if len(lengths) > 1:
        return f"lists of different sizes, {min(lengths)} and {max(lengths)}"
    if None in columns:
        return ""
    rows = zip(*(column or () for column in columns), strict=True)
    return next((found for row in rows if (found := unequal_sizes(row))), "")


def stacked_chunk(items: list[Any] | HessianFlowError) -> tuple[int, Any] | HessianFlowError:
    """Return the number of items and their batch."""
    if isinstance(items, HessianFlowError):
        return items
    try:
        return len(items), stacked(items)
    except HessianFlowError as error:
        if get_worker_info() is None:
            raise
        return HessianFlowError(str(error))


def kept_chunk(items: list[Any] | HessianFlowError) -> tuple[int, Any] | HessianFlowError:
    """Return the number of items and the items, packed if this process is a worker."""
    if isinstance(items, HessianFlowError):
        return items
    return len(items), items if get_worker_info() is None else Packed(items)


class Packed:
    """Any objects, pickled with all their plain tensors side by side in one.

    Each tensor sent alone would take one of the few open files of the process.
    """

    def __init__(self, items: Any) -> None:
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(items)
        self._pickled = stream.getvalue()
        self._slots: list[tuple[int, torch.dtype, torch.Size]] = []
        size = 0
        for tensor in pickler.tensors:
            self._slots.append((size, tensor.dtype, tensor.shape))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self._memory = torch.empty(size, dtype=torch.uint8)
        for view, tensor in zip(self._views(), pickler.tensors, strict=True):
            view.copy_(tensor)

    def unpacked(self) -> Any:
        """Return the objects, whose tensors are views of the memory that was sent."""
        return _Unpickler(io.BytesIO(self._pickled), list(self._views())).load()

    def _views(self) -> Iterator[Tensor]:
        for start, dtype, shape in self._slots:
            stop = start + shape.numel() * dtype.itemsize
            yield self._memory[start:stop].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """A pickler that leaves plain tensors out and collects them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor or obj.layout != torch.strided or obj.device.type != "cpu":
            return None
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg():
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def rows_of(stack: Any, rows: slice) -> Any:
    """Return the examples `rows` of a batch that torch's default collate has stacked."""
    if isinstance(stack, Tensor) or _is_text(stack):
        return stack[rows]
    return rebuilt(stack, [rows_of(entry, rows) for entry in _opened(stack)])


def joined(stacks: list[Any]) -> Any:
    """Return one batch joined from several that torch's default collate has stacked."""
    first = stacks[0]
    if len(stacks) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(stacks)
    if _is_text(first):
        return type(first)(text for stack in stacks for text in stack)
    columns = zip(*map(_opened, stacks), strict=True)
    return rebuilt(first, [joined(list(column)) for column in columns])


def end_workers(chunks: Any, owner: int) -> None:
    """End the workers of a loader's iterator, if it has any and the process `owner` is this one."""
    if os.getpid() != owner:
        chunks._shutdown = True  # a worker has a copy, and must not end those of its parent
    elif hasattr(chunks, "_shutdown_workers"):
        chunks._shutdown_workers()


def check_options(
    dataset: Dataset[Any], num_workers: int, chunk_size: int, prefetch_examples: int
) -> None:
    """Refuse a data set that is not map-style, and numbers out of range, by name."""
    has_items = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    if not hasattr(dataset, "__len__") or not has_items:
        raise HessianFlowError(
            "dataset must be map-style, with a length and items by index, got"
            f" {type(dataset).__name__}: use hf.data.StreamBatches for an iterable data set"
        )
    check_numbers(num_workers, chunk_size, prefetch_examples)


def check_numbers(num_workers: int, chunk_size: int, prefetch_examples: int) -> None:
    """Raise HessianFlowError for a number that is out of range, and name it."""
    for name, value, least in (
        ("num_workers", num_workers, 0),
        ("chunk_size", chunk_size, 1),
        ("prefetch_examples", prefetch_examples, 1),
    ):
        if value < least:
            raise HessianFlowError(f"{name} must be at least {least}, got {value}")


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
