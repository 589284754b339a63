"""Batches of changing size from iterable data, whose length need not be known."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hessianflow.batches import take_rows
from hessianflow.data import loading
from hessianflow.data.sampling import COMPARED_SIZES
from hessianflow.data.stream_making import BatchMaker
from hessianflow.data.stream_place import StreamPlace
from hessianflow.data.stream_reader import Reader
from hessianflow.data.stream_source import Source, loader_options
from hessianflow.data.streams import examples_to_judge, next_size
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.structure import is_list


class StreamBatches(StreamPlace):
    """Resumable batches of iterable data, whose size may change at any time.

    The data can be any iterable: a `torch.utils.data.IterableDataset`, a streaming data set of
    Hugging Face, a WebDataset, a `DataLoader` or `StatefulDataLoader`, or a list. They can also be
    a function that makes an iterator; it is called with the number of the pass if it has a
    parameter for it. The data choose the order of the examples, so shuffling is their task.
    `set_epoch(epoch)` of the data, or of their `dataset` or `sampler`, is called before each pass.

    A pass over the data, which is an epoch, ends when their iterator does, and the next pass starts
    another iterator. If `num_examples` is given, a pass has that many examples; data that give
    more, or never end, are read on from where the previous pass ended. The last batches of a pass
    are those of :class:`~hessianflow.data.streams.ExampleStream`: if the rest would be less than
    half a batch, it is shared evenly with the batch before. To know this when the length is
    unknown, half a batch more than the next one is read ahead and kept in this process.

    A saved state continues without repeating or losing an example, at any batch size. If the data
    have `state_dict` and `load_state_dict`, the saved state includes a state of theirs from at most
    about a thousand examples before the place
    (:data:`~hessianflow.data.stream_reader.SNAPSHOT_EXAMPLES`), and the examples from there on are
    read again. Otherwise, and in workers, the pass is read from its start and the examples that
    were trained on are dropped, which takes as long as reading them. Both ways need data that give
    the same order again when a pass of the same number starts. If an example differs, a warning
    says so. The state of a shuffled Hugging Face data set leaves out the shuffle buffer and thus
    loses examples: resume such data with `by_count`. A plain generator gives a single pass, and can
    be resumed only with a new generator.

    With several ranks, every rank reads all examples and takes its contiguous shard of each batch,
    as :class:`~hessianflow.data.streams.ExampleStream` describes. With `sharded`, the data give
    each rank its own part, from which the rank takes its share of each batch (shares differ by at
    most one example). Ranks whose parts end at different times would wait for each other, so
    `num_examples` over all ranks must be given: every rank makes the same number of batches, and a
    part that ends too early is an error. Such a stream is resumed by counting.

    Args:
        dataset: The iterable data, or a function that makes an iterator.
        batch_size: Examples per batch over all ranks.
        num_examples: Examples of a pass, over all ranks. None if it is unknown; the attribute
            `num_examples` is then `sys.maxsize`.
        batched: Whether each item of the data is a batch of any size, which is regrouped by its
            rows, instead of an example. None: only if the data are a `DataLoader` with a batch
            size.
        sharded: Whether the data give each rank its own part.
        by_count: Resume by counting, even if the data have a state of their own.
        seed: Seed of everything that `collate_fn` draws, of the workers, and of everything that the
            data draw from the global generators when a pass starts (such as the order of a
            `DataLoader`). The data themselves must be able to repeat any later draw.
        num_workers: Number of processes that read; 0 reads in this process. Each worker reads the
            data itself, so the data must give each worker its own part by `get_worker_info`, as the
            data sets of Hugging Face and WebDataset do. The order of the examples depends on the
            number of workers and on `chunk_size`.
        pin_memory: Make batches in page-locked memory, for an overlapping copy to a GPU.
        device: Device of the batches.
        transform: Function applied to every batch once it is on the device.
        collate_fn: Function that makes a batch from the list of its items (with several ranks, from
            the items of this rank's shard), in this process. None for torch's default.
        chunk_size: Number of examples that are read at a time.
        prefetch_examples: Number of examples to read ahead, over all workers.
        value_range: Lowest and highest valid input after `transform`, to which attacks are clamped;
            not used here.
        worker_init_fn: Function called in each worker with its number when it starts.
        persistent_workers: Keep the workers from one pass to the next.

    Raises:
        HessianFlowError: The data are not iterable, or a number is out of range. While iterating:
            the data are empty, end early or cannot be started again, items cannot be stacked, or a
            worker has died.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        num_examples: int | None = None,
        batched: bool | None = None,
        sharded: bool = False,
        by_count: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
        transform: Callable[[Batch], Batch] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        chunk_size: int = 32,
        prefetch_examples: int = 1024,
        value_range: tuple[Tensor, Tensor] | None = None,
        worker_init_fn: Callable[[int], None] | None = None,
        persistent_workers: bool = False,
    ) -> None:
        loading.check_numbers(num_workers, chunk_size, prefetch_examples)
        if batched is None:
            batched = isinstance(dataset, DataLoader) and dataset.batch_sampler is not None
        _check(dataset, batched, sharded, num_examples, num_workers, collate_fn, seed)
        self.value_range = value_range
        maker = BatchMaker(
            collate_fn,
            transform,
            device=device,
            pin_memory=pin_memory,
            seed=seed,
            gives_batches=batched,
        )
        workers = (num_workers, chunk_size, prefetch_examples, worker_init_fn, persistent_workers)
        reader = Reader(
            Source(dataset),
            maker,
            seed=seed,
            chunk_size=chunk_size,
            by_count=by_count or sharded,
            options=loader_options(*workers),
        )
        super().__init__(reader, maker, batch_size, num_examples, sharded=sharded)

    @property
    def device(self) -> torch.device:
        """Return the device of the batches."""
        return self._maker.device

    def rewind(self) -> None:
        """Return to the first example of the current pass.

        Raises:
            HessianFlowError: The data cannot be started again.
        """
        if self._cursor > 0:
            self.load_state_dict({**self.state_dict(), "cursor": 0})

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current pass, then enter the next."""
        while (size := self._next_size()) > 0:
            start = self._cursor
            batch = self._batch(size)
            # The cursor moves before a batch is yielded: a state taken now lies after it.
            self._cursor = start + size
            self._position += size
            yield batch
        self._epoch += 1
        self._cursor = 0
        if self._num_examples is None:
            self._begin_lap()

    def _next_size(self) -> int:
        if self._num_examples is not None:
            return next_size(self._num_examples - self._cursor, self._batch_size)
        needed = examples_to_judge(self._batch_size)
        self._fill(needed)
        left = len(self._waiting)
        if left == 0 and self._cursor == 0:
            raise self._is_empty()
        return next_size(left, self._batch_size)

    def _batch(self, size: int) -> Batch:
        """Take the next `size` examples and return this rank's share of them.

        After an error, the examples wait again.
        """
        start = self._own(self._position)
        count = self._own(self._position + size) - start
        at_end = self._fill(count) and not self._waiting
        if at_end and self._cursor == 0 and self._position > 0:
            self._begin_lap()  # the previous pass ended together with the data
            start = 0
            count = self._own(size)
            self._fill(count)
        if len(self._waiting) < count:
            raise self._ended_early(start + len(self._waiting))
        taken = self._waiting.take(count)
        try:
            batch = self._maker.finished(self._made(taken, size))
        except BaseException:
            self._waiting.put_back(taken)
            raise
        if taken:
            self._last = (start, taken)
        return batch

    def _fill(self, count: int) -> bool:
        """Read until `count` examples wait; return whether the lap ended before that."""
        while len(self._waiting) < count:
            chunk = self._reader.next_chunk(count - len(self._waiting))
            if chunk is None:
                return True
            self._waiting.add(*chunk)
        return False

    def _is_empty(self) -> HessianFlowError:
        return HessianFlowError(
            f"the stream {self._reader.source.name} is empty: at least one example is needed in"
            f" pass {self._epoch + 1}; an iterator that was read before gives nothing more"
        )

    def _ended_early(self, own: int) -> HessianFlowError:
        """Return the error for data that ended after `own` examples of a lap."""
        if self._reader.position == 0:
            return self._is_empty()
        where = "all of them"
        if self._is_sharded:
            where = f"those of rank {self._rank}"
        return HessianFlowError(
            f"the stream {self._reader.source.name} ended early, after {own} examples ({where}) and"
            f" {self._cursor} of the {self._num_examples} that num_examples states for pass"
            f" {self._epoch + 1}: correct num_examples, or leave it out"
        )

    def _made(self, taken: list[Any], size: int) -> Any:
        """Return this rank's share of a batch of `size` examples, from the examples it took."""
        key = (self._epoch, self._cursor)
        first = size * self._rank // self._world_size
        last = size * (self._rank + 1) // self._world_size
        if self._is_sharded:
            first = 0
            last = self._own(self._position + size) - self._own(self._position)
        if taken:
            return self._maker.made(taken, slice(first, last), *key)
        if self._last is not None:
            return self._maker.without_rows(self._last[1], *key)
        self._fill(1)
        return self._peeked(1, lambda one: self._maker.without_rows(one, *key))

    def sample(self, count: int) -> Batch:
        """Return the next `count` examples, for a curvature probe; the stream does not move.

        The examples are read ahead and kept. All ranks get the same ones, unless the stream is
        sharded.

        Raises:
            HessianFlowError: The pass has fewer examples left.
        """
        if count < 1:
            raise HessianFlowError(f"count must be at least 1, got {count}")
        self._fill(count)
        if len(self._waiting) < count:
            raise HessianFlowError(
                f"count must not exceed the {len(self._waiting)} examples that are left in this"
                f" pass, got {count}: ask for fewer"
            )
        return self._maker.finished(self._peeked(count, self._whole))

    def _whole(self, taken: list[Any]) -> Any:
        count = len(taken)
        if not self._maker.takes_items:
            count = sum(size for size, _ in taken)
        return self._maker.made(taken, slice(0, count), self._epoch, self._cursor)

    def _peeked(self, count: int, make: Callable[[list[Any]], Any]) -> Any:
        """Return what `make` makes of the next `count` examples, which stay in the queue."""
        taken = self._waiting.take(count)
        try:
            return make(taken)
        finally:
            self._waiting.put_back(taken)

    def check_rows(self) -> None:
        """Refuse a `collate_fn` whose batches cannot be cut into rows, and name the entry.

        The examples are read ahead and kept; see :meth:`AdaptiveBatches.check_rows`.
        """
        if self._maker.collate is None:
            return
        self._fill(max(COMPARED_SIZES))
        for size in COMPARED_SIZES:
            if size <= len(self._waiting):
                batch = self._peeked(size, self._whole)
                take_rows(tuple(batch) if is_list(batch) else batch, slice(1), size)


def _check(
    dataset: Any,
    batched: bool,
    sharded: bool,
    num_examples: int | None,
    num_workers: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
) -> None:
    """Refuse arguments that do not go together."""
    fault = ""
    if num_examples is not None and num_examples < 1:
        fault = f"num_examples must be at least 1, or None if it is unknown, got {num_examples}"
    elif seed < 0:
        fault = f"seed must be at least 0, got {seed}"
    elif sharded and num_examples is None:
        fault = (
            "sharded=True needs num_examples, over all ranks: ranks whose parts end at different"
            " times would wait for each other"
        )
    elif batched and collate_fn is not None:
        fault = (
            "collate_fn makes a batch of single examples, but with batched=True the data give"
            " batches: leave one of the two out"
        )
    elif num_workers > 0 and isinstance(dataset, DataLoader):
        fault = (
            f"num_workers must be 0 for a {type(dataset).__name__}, got {num_workers}: give the"
            " workers to the loader itself"
        )
    elif num_workers > 0 and isinstance(dataset, Iterator):
        fault = (
            f"num_workers must be 0 for a {type(dataset).__name__}, which cannot be sent to"
            f" workers, got {num_workers}: pass the function that makes the iterator"
        )
    if fault:
        raise HessianFlowError(fault)
