"""Batches of changing size from any map-style data set, loaded ahead by worker processes.

A `DataLoader` loads small chunks of fixed size in the order of the epoch; the consumer cuts the
stream of chunks into batches of the size wanted at that moment. A change of size therefore takes
effect on the very next batch, and the workers never notice it. (With several ranks the parts of
future batches do depend on their size: there, what was loaded ahead is dropped once.) Chunks are
stacked where they are loaded if torch's default collate makes the batches; any other `collate_fn`
is given all items of a batch at once, in the process that trains.

The random numbers of an example's own transforms (Python, NumPy and torch, in worker or main
process, and generators that the data set holds) are seeded from (seed, epoch, index), and those of
a `collate_fn` from (seed, epoch, place), so that they too are the same whatever the workers or the
interruptions; see :mod:`hessianflow.data.randomness`.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hessianflow.batches import map_tensors, move, take_rows
from hessianflow.data.loading import (
    ChunkPlan,
    Failure,
    Packed,
    SeededExamples,
    joined,
    kept_chunk,
    rows_of,
    stacked,
    stacked_chunk,
    start_worker,
)
from hessianflow.data.randomness import Randomness
from hessianflow.data.streams import ExampleStream, stream_seed
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.structure import is_list

COMPARED_SIZES = (7, 5)
"""Of the batches that show which entries have a row an example: two that few tensors have. Ours."""


class AdaptiveBatches(ExampleStream):
    """Resumable batches of a map-style data set, whose size may change at any time.

    Iterating yields what is left of the current epoch, the last partial batch included, then enters
    the next epoch (see `hessianflow.interfaces.ResizableBatches`). All iterators share one place:
    use one at a time. After an error of the data set the batch that failed is the next one.

    A batch is what `collate_fn` returns, a list as a tuple; to train on, it must be a pair (inputs,
    targets).

    A data set that is changed between two epochs is seen as it is when an epoch begins: by workers,
    too, as they are started anew. A change within an epoch reaches what is not loaded yet in this
    process, and workers in the next one.

    Args:
        dataset: any map-style `torch.utils.data.Dataset` with a length; its items are collated by
            `collate_fn`.
        batch_size: examples a batch, over all ranks.
        seed: of order and of the examples' own random transforms.
        num_workers: processes that load; 0: load in this one.
        pin_memory: page-locked chunks, for an overlapping copy to a GPU.
        device: where the batches are put.
        transform: applied to every batch once it is on the device, e.g.
            :class:`hessianflow.data.Normalise`.
        collate_fn: makes a batch of the list of its items (on several ranks, of those of this
            rank's part), in this process: work on single examples belongs in the data set. None:
            torch's default, applied where items are loaded.
        shuffle: False for evaluation: the order is the stored one, and a batch may be larger than
            the set.
        chunk_size: examples a worker loads at a time.
        prefetch_examples: how far to load ahead, over all workers.
        value_range: lowest and highest valid input (after `transform`), to clamp attacks; handed
            through.
        worker_init_fn: called in each worker with its number when it starts; `torch.initial_seed()`
            then depends on (seed, epoch) and that number.
        persistent_workers: keep the workers from one epoch to the next. It saves the time to start
            them (some 50 ms a worker where processes are forked), but they go on with the data set
            as it was when they started.

    Raises:
        HessianFlowError: a data set without a length or without items by index, or a number out of
            range; at a batch: items that cannot be stacked, or a data set whose length has changed.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
        transform: Callable[[Batch], Batch] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        chunk_size: int = 32,
        prefetch_examples: int = 1024,
        value_range: tuple[Tensor, Tensor] | None = None,
        worker_init_fn: Callable[[int], None] | None = None,
        persistent_workers: bool = False,
    ) -> None:
        _check_options(dataset, num_workers, chunk_size, prefetch_examples)
        super().__init__(len(dataset), batch_size, seed=seed, shuffle=shuffle)  # type: ignore[arg-type]
        self._examples = SeededExamples(dataset, seed)
        self._collate = None if collate_fn is default_collate else collate_fn
        self._randomness = Randomness(collate_fn)
        self._transform, self._device, self._pin_memory = (
            transform,
            torch.device(device),
            pin_memory,
        )
        self._value_range = value_range
        self._plan = ChunkPlan(chunk_size)
        self._options: dict[str, Any] = {
            "batch_sampler": self._plan,
            "num_workers": num_workers,
            "collate_fn": stacked_chunk if self._collate is None else kept_chunk,
            "pin_memory": pin_memory and self._collate is None,
            "generator": torch.Generator(),  # else the loader draws from the global one
            "worker_init_fn": partial(start_worker, worker_init_fn),
            "persistent_workers": persistent_workers and num_workers > 0,
            "prefetch_factor": (
                max(2, -(-prefetch_examples // (chunk_size * num_workers))) if num_workers else None
            ),
        }
        self._loader: DataLoader[Any] = DataLoader(self._examples, **self._options)
        self._chunks: Iterator[Any] | None = None
        self._ending: weakref.finalize[..., AdaptiveBatches] | None = None
        self._loaded: deque[Any] = deque()  # stacked chunks, or items
        self._is_stackable = False  # until a chunk was looked at

    @property
    def device(self) -> torch.device:
        """Where the batches are put."""
        return self._device

    @property
    def value_range(self) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest valid input, as given."""
        return self._value_range

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on; workers go on."""
        super().set_batch_size(batch_size)
        if self._world_size > 1:
            self._forget_chunks()

    def set_shard(self, rank: int, world_size: int) -> None:
        """Hand out only this rank's contiguous part of every batch, from the very next batch on."""
        super().set_shard(rank, world_size)
        self._forget_chunks()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of `state`, at its batch size; see
        :meth:`ExampleStream.load_state_dict`."""
        super().load_state_dict(state)
        self._forget_chunks()

    def __iter__(self) -> Iterator[Batch]:
        yield from self._handed_out(self._loaded_batch)
        self._forget_chunks()

    def examples(self, indices: Tensor) -> Batch:
        """Return the examples at `indices` (int64 [n]), loaded here and now; the stream does not
        move.

        Transforms of the data set apply as in epoch 0: give a set without random ones to measure
        on.
        """
        items = self._examples.__getitems__([(0, int(index)) for index in indices])
        return self._finished(self._collated(items, 0, self._num_examples))

    def sample(self, count: int, seed: int = 0) -> Batch:
        """Return `count` different examples chosen by `seed` alone: the fixed batch of a curvature
        probe.

        Raises:
            HessianFlowError: `count` below 1 or above the number of examples.
        """
        return self.examples(self._sampled_indices(count, seed))

    def check_rows(self) -> None:
        """Refuse a `collate_fn` whose batches cannot be cut, before any is.

        Whether an entry has one row an example is seen by collating two batches of different
        size: of one batch alone, a mask [4, 4] beside four examples looks like four rows.

        Raises:
            HessianFlowError: an entry that has another number of rows, by name.
        """
        sizes = [size for size in COMPARED_SIZES if size <= self._num_examples]
        for size in sizes if self._collate is not None else ():
            items = self._examples.__getitems__([(0, index) for index in range(size)])
            batch = self._collated(items, 0, self._num_examples)
            take_rows(tuple(batch) if is_list(batch) else batch, slice(1), size)

    def _places_from(self, start: int, stop: int) -> Tensor:
        """Return the places this rank will need: those of the batch at hand, then of all later ones
        at the current size."""
        if self._world_size == 1:
            return torch.arange(start, self._num_examples)
        parts = [torch.arange(start, stop)]
        first = self._cursor
        while first < self._num_examples:
            size = self._next_size(first)
            parts.append(
                torch.arange(
                    *(first + size * r // self._world_size for r in (self._rank, self._rank + 1))
                )
            )
            first += size
        return torch.cat(parts)

    def _loaded_batch(self, start: int, stop: int) -> Batch:
        """Return the batch of this rank's places, from what was loaded ahead."""
        try:
            if self._chunks is None:
                self._start_loading(start, stop)
            if stop == start:
                return self._finished(self._without_rows())
            if self._collate is None:
                return self._finished(self._next_rows(stop - start))
            items = [self._next_item() for _ in range(stop - start)]
            return self._finished(self._collated(items, self._epoch, start))
        except BaseException:
            self._end_workers()
            raise

    def _start_loading(self, start: int, stop: int) -> None:
        """Load this rank's part of this batch and of all later ones of the epoch, by new workers.

        Raises:
            HessianFlowError: the data set is not as long as it was.
        """
        dataset = self._examples.dataset
        length = len(dataset)  # type: ignore[arg-type]
        if length != self._num_examples:
            raise HessianFlowError(
                f"the {type(dataset).__name__} had {self._num_examples} examples and now has"
                f" {length}: make a new AdaptiveBatches when a data set changes its length"
            )
        self._examples.randomness.look_again()
        self._randomness.look_again()
        self._plan.keys = [
            (self._epoch, int(i)) for i in self._order()[self._places_from(start, stop)]
        ]
        self._options["generator"].manual_seed(stream_seed(self._seed, "workers", self._epoch))
        self._chunks = iter(self._loader)
        # Freed with a cycle of objects, the iterator would find its queues closed, and wait some
        # seconds for each worker.
        self._ending = weakref.finalize(self, _end_workers_of, self._chunks, os.getpid())
        self._ending.atexit = False

    def _next_chunk(self) -> tuple[int, Any]:
        assert self._chunks is not None
        chunk = next(self._chunks, None)
        if chunk is None:
            raise HessianFlowError(
                "the loader ended before the epoch did: does the data set raise StopIteration?"
            )
        if isinstance(chunk, Failure):
            raise HessianFlowError(chunk.message)
        return chunk  # type: ignore[no-any-return]

    def _next_rows(self, count: int) -> Any:
        """Return the next `count` examples, joined from chunks; what is left of the last one
        stays."""
        parts = []
        while count > 0:
            if not self._loaded:
                size, chunk = self._next_chunk()
                if not self._is_stackable:
                    rows_of(chunk, slice(0, 0))  # refuses at the start what could not be cut later
                    self._is_stackable = True
                self._loaded.append(
                    (size, move(chunk, self._device, non_blocking=self._pin_memory))
                )
            size, chunk = self._loaded.popleft()
            if size > count:
                self._loaded.appendleft((size - count, rows_of(chunk, slice(count, None))))
                chunk = rows_of(chunk, slice(count))
            parts.append(chunk)
            count -= size
        return joined(parts)

    def _next_item(self) -> Any:
        if not self._loaded:
            _, items = self._next_chunk()
            self._loaded.extend(items.unpacked() if isinstance(items, Packed) else items)
        return self._loaded.popleft()

    def _without_rows(self) -> Any:
        """Return a batch of no example: the first example's, less its one row."""
        return take_rows(
            self._collated(self._examples.__getitems__([(0, 0)]), 0, self._num_examples),
            slice(0, 0),
            1,
        )

    def _collated(self, items: Any, epoch: int, place: int) -> Any:
        """Return a batch of items on the device; what `collate_fn` draws depends on epoch and place
        alone.

        For items that are outside the order the place is the one behind the last.
        """
        if self._collate is None:
            return move(stacked(items), self._device)
        with self._randomness.kept():
            self._randomness.seed(self._seed, "collate", epoch, place)
            batch = self._collate(items)
        if self._pin_memory:
            batch = map_tensors(lambda t: t.pin_memory(), batch)
        return move(batch, self._device, non_blocking=self._pin_memory)

    def _finished(self, batch: Any) -> Batch:
        batch = tuple(batch) if is_list(batch) else batch
        return batch if self._transform is None else self._transform(batch)

    def _end_workers(self) -> None:
        """End the workers after an error: the loader is of no use, and what was taken off it is
        needed again."""
        # The traceback holds on to the iterator. Processes forked later would inherit it, and try
        # to end its workers.
        if self._ending is not None:
            self._ending()
        self._forget_chunks()
        self._loader = DataLoader(self._examples, **self._options)

    def rewind(self) -> None:
        """Go to the first example of the epoch under way; see :meth:`ExampleStream.rewind`."""
        super().rewind()
        self._forget_chunks()  # they are of the place that an iteration before had reached

    def _forget_chunks(self) -> None:
        if self._ending is not None:
            self._ending.detach()
            self._ending = None
        self._chunks = None
        self._loaded.clear()


def _end_workers_of(chunks: Any, owner: int) -> None:
    """End the workers of a loader's iterator, if it has any and this is the process that started
    them."""
    if os.getpid() != owner:
        chunks._shutdown = True  # a worker has a copy, and must leave those of others alone
    elif hasattr(chunks, "_shutdown_workers"):
        chunks._shutdown_workers()


def _check_options(
    dataset: Dataset[Any], num_workers: int, chunk_size: int, prefetch_examples: int
) -> None:
    has_items = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    if not hasattr(dataset, "__len__") or not has_items:
        raise HessianFlowError(
            "dataset must be map-style, with a length and items by index, got"
            f" {type(dataset).__name__}: an iterable data set has no order to resume in"
        )
    for name, value, least in (
        ("num_workers", num_workers, 0),
        ("chunk_size", chunk_size, 1),
        ("prefetch_examples", prefetch_examples, 1),
    ):
        if value < least:
            raise HessianFlowError(f"{name} must be at least {least}, got {value}")
