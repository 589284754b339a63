"""Batches of changing size from any map-style data set, loaded ahead by worker processes.

A `DataLoader` loads small chunks of fixed size in the order of the epoch
(:mod:`hessianflow.data.loading`); the consumer cuts the stream of chunks into batches of the
current size. A change of size therefore takes effect on the very next batch, and the workers never
notice it. (With several ranks, a rank's shard of a future batch does depend on its size: there, the
chunks loaded ahead are dropped once.)

The random numbers of an example's own transforms (:mod:`hessianflow.data.randomness`) are seeded
from (seed, epoch, index), and those of a `collate_fn` from (seed, epoch, position), so that neither
workers nor interruptions change them.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from hessianflow.batches import map_tensors, take_rows, to_device
from hessianflow.data import loading
from hessianflow.data.randomness import Randomness
from hessianflow.data.streams import ExampleStream, stream_seed
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.structure import is_list

COMPARED_SIZES = (7, 5)
"""Sizes of two batches that show which entries have a row per example: our choice, since rare."""


class AdaptiveBatches(ExampleStream):
    """Resumable batches of a map-style data set, whose size may change at any time.

    A batch is what `collate_fn` returns, a list as a tuple; to train on, it must be a pair (inputs,
    targets). For the order, `batch_size` and `shuffle` see
    :class:`~hessianflow.data.streams.ExampleStream`.

    A change of the data set between two epochs takes effect when the next epoch begins, also in the
    workers, which start again. A change within an epoch reaches the examples that this process has
    not loaded yet, and workers in the next epoch.

    Args:
        dataset: Map-style `torch.utils.data.Dataset` with a length.
        seed: Seed of the order and of the examples' own random transforms.
        num_workers: Number of processes that load; 0 loads in this one.
        pin_memory: Load into page-locked memory, for an overlapping copy to a GPU.
        device: Device of the batches.
        transform: Function applied to every batch once it is on the device, for example
            :class:`hessianflow.data.Normalise`.
        collate_fn: Function that makes a batch of the list of its items (with several ranks, of the
            items of this rank's shard), in this process: work on single examples belongs in the
            data set. None for torch's default, applied where items are loaded.
        chunk_size: Examples that a worker loads at a time.
        prefetch_examples: Examples to load ahead, over all workers.
        value_range: Lowest and highest valid input after `transform`, to clamp attacks; not used
            here.
        worker_init_fn: Function called in each worker with its number when it starts;
            `torch.initial_seed()` then depends on (seed, epoch) and that number.
        persistent_workers: Keep the workers from one epoch to the next. This saves the time to
            start them (some 50 ms per worker where processes are forked), but they keep the data
            set as it was when they started.

    Raises:
        HessianFlowError: The data set has no length or no items by index, or a number is out of
            range; while iterating, items cannot be stacked, or the length has changed.
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
        loading.check_options(dataset, num_workers, chunk_size, prefetch_examples)
        length = len(dataset)  # type: ignore[arg-type]
        super().__init__(length, batch_size, seed=seed, shuffle=shuffle)
        self._examples = loading.SeededExamples(dataset, seed)
        self._collate = None if collate_fn is default_collate else collate_fn
        self._randomness = Randomness(collate_fn)
        self._transform = transform
        self.device = torch.device(device)
        self.value_range = value_range
        self._pin_memory = pin_memory
        self._chunk_size = chunk_size
        self._plan: list[list[loading.Key]] = []
        self._options: dict[str, Any] = {
            "batch_sampler": self._plan,
            "num_workers": num_workers,
            "collate_fn": loading.stacked_chunk if self._collate is None else loading.kept_chunk,
            "pin_memory": pin_memory and self._collate is None,
            "generator": torch.Generator(),  # else the loader draws from the global one
            "worker_init_fn": partial(loading.start_worker, worker_init_fn),
        }
        if num_workers:
            chunks = -(-prefetch_examples // (chunk_size * num_workers))
            self._options["prefetch_factor"] = max(2, chunks)
            self._options["persistent_workers"] = persistent_workers
        self._loader: DataLoader[Any] = DataLoader(self._examples, **self._options)
        self._chunks: Iterator[Any] | None = None
        self._ending: weakref.finalize[..., AdaptiveBatches] | None = None
        self._loaded: deque[Any] = deque()  # (size, stacked chunk) pairs, or items
        self._is_stackable = False  # until a chunk was checked

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on; the workers continue."""
        super().set_batch_size(batch_size)
        if self._world_size > 1:
            self._forget_chunks()

    def set_shard(self, rank: int, world_size: int) -> None:
        """Yield only this rank's contiguous shard of every batch, from the very next batch on."""
        super().set_shard(rank, world_size)
        self._forget_chunks()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position and batch size of `state`, and drop the chunks loaded ahead."""
        super().load_state_dict(state)
        self._forget_chunks()

    def __iter__(self) -> Iterator[Batch]:
        yield from self._handed_out(self._loaded_batch)
        self._forget_chunks()

    def examples(self, indices: Tensor) -> Batch:
        """Return the examples at `indices` (int64 [n]), loaded by this process; the stream stays.

        Transforms of the data set apply as in epoch 0; measure on a data set without random ones.
        """
        items = self._examples.__getitems__([(0, int(index)) for index in indices])
        return self._finished(self._collated(items, 0, self._num_examples))

    def check_rows(self) -> None:
        """Refuse a `collate_fn` whose batches cannot be cut into rows, and name the entry.

        Two batches of different size are collated, since in one of four examples a mask [4, 4]
        looks like four rows.
        """
        for size in COMPARED_SIZES:
            if self._collate is not None and size <= self._num_examples:
                items = self._examples.__getitems__([(0, index) for index in range(size)])
                batch = self._collated(items, 0, self._num_examples)
                take_rows(_as_tuple(batch), slice(1), size)

    def _positions_from(self, start: int, stop: int) -> Tensor:
        """Return the positions that this rank needs: [start, stop), then those of later batches."""
        if self._world_size == 1:
            return torch.arange(start, self._num_examples)
        positions = [torch.arange(start, stop)]
        first = self._cursor
        while first < self._num_examples:
            size = self._next_size(first)
            positions.append(torch.arange(*self._shard_of(first, size)))
            first += size
        return torch.cat(positions)

    def _loaded_batch(self, start: int, stop: int) -> Batch:
        """Return the batch of the positions [start, stop), from the chunks loaded ahead."""
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
        """Start to load this rank's shards of this batch and all later ones of the epoch."""
        dataset = self._examples.dataset
        length = len(dataset)  # type: ignore[arg-type]
        if length != self._num_examples:
            raise HessianFlowError(
                f"the {type(dataset).__name__} had {self._num_examples} examples and now has"
                f" {length}: make a new AdaptiveBatches when a data set changes its length"
            )
        self._examples.randomness.look_again()
        self._randomness.look_again()
        indices = self._order()[self._positions_from(start, stop)]
        keys = [(self._epoch, int(index)) for index in indices]
        starts = range(0, len(keys), self._chunk_size)
        self._plan[:] = [keys[start : start + self._chunk_size] for start in starts]
        self._options["generator"].manual_seed(stream_seed(self._seed, "workers", self._epoch))
        self._chunks = iter(self._loader)
        # If the iterator were freed with a cycle of objects, it would find its queues closed and
        # wait some seconds for each worker.
        self._ending = weakref.finalize(self, loading.end_workers, self._chunks, os.getpid())
        self._ending.atexit = False

    def _next_chunk(self) -> tuple[int, Any]:
        assert self._chunks is not None
        chunk = next(self._chunks, None)
        if chunk is None:
            raise HessianFlowError(
                "the loader ended before the epoch did: does the data set raise StopIteration?"
            )
        if isinstance(chunk, HessianFlowError):
            raise chunk
        return chunk  # type: ignore[no-any-return]

    def _next_rows(self, count: int) -> Any:
        """Return the next `count` examples, joined from chunks; the rest of the last one stays."""
        chunks = []
        while count > 0:
            if not self._loaded:
                size, chunk = self._next_chunk()
                if not self._is_stackable:
                    loading.rows_of(chunk, slice(0, 0))  # refuse now what cannot be cut later
                    self._is_stackable = True
                there = to_device(chunk, self.device, non_blocking=self._pin_memory)
                self._loaded.append((size, there))
            size, chunk = self._loaded.popleft()
            if size > count:
                rest = loading.rows_of(chunk, slice(count, None))
                self._loaded.appendleft((size - count, rest))
                chunk = loading.rows_of(chunk, slice(count))
            chunks.append(chunk)
            count -= size
        return loading.joined(chunks)

    def _next_item(self) -> Any:
        if not self._loaded:
            _, items = self._next_chunk()
            if isinstance(items, loading.Packed):
                items = items.unpacked()
            self._loaded.extend(items)
        return self._loaded.popleft()

    def _without_rows(self) -> Any:
        """Return an empty batch: that of the first example without its one row."""
        items = self._examples.__getitems__([(0, 0)])
        return take_rows(self._collated(items, 0, self._num_examples), slice(0, 0), 1)

    def _collated(self, items: Any, epoch: int, position: int) -> Any:
        """Return a batch of items on the device; `collate_fn` draws by epoch and position alone.

        Items outside the order of an epoch have the position after the last.
        """
        if self._collate is None:
            return to_device(loading.stacked(items), self.device)
        with self._randomness.kept():
            self._randomness.seed(self._seed, "collate", epoch, position)
            batch = self._collate(items)
        if self._pin_memory:
            batch = map_tensors(lambda t: t.pin_memory(), batch)
        return to_device(batch, self.device, non_blocking=self._pin_memory)

    def _finished(self, batch: Any) -> Batch:
        batch = _as_tuple(batch)
        return batch if self._transform is None else self._transform(batch)

    def _end_workers(self) -> None:
        """End the workers after an error, and make a loader that loads the lost chunks again."""
        # The traceback keeps the iterator alive. Processes forked later would inherit it, and try
        # to end its workers.
        if self._ending is not None:
            self._ending()
        self._forget_chunks()
        self._loader = DataLoader(self._examples, **self._options)

    def rewind(self) -> None:
        """Return to the first example of the current epoch, of which some may have been taken."""
        super().rewind()
        self._forget_chunks()  # an earlier iteration loaded them for a later position

    def _forget_chunks(self) -> None:
        if self._ending is not None:
            self._ending.detach()
            self._ending = None
        self._chunks = None
        self._loaded.clear()


def _as_tuple(batch: Any) -> Any:
    return tuple(batch) if is_list(batch) else batch
