"""Batches of changing size from iterable data, whose length need not be known."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from hessianflow.batches import map_tensors, take_rows, to_device
from hessianflow.data import loading
from hessianflow.data.fingerprint import fingerprint
from hessianflow.data.randomness import Randomness
from hessianflow.data.regroup import Items, Rows, join
from hessianflow.data.sampling import COMPARED_SIZES
from hessianflow.data.stream_source import Reader, Source, loader_options
from hessianflow.data.streams import examples_to_judge, next_size
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.structure import is_list

STATE_KEYS = ("epoch", "cursor", "batch_size", "lap", "position", "at", "identity")


class StreamBatches:
    """Resumable batches of iterable data, whose size may change at any time.

    The data are any iterable: a `torch.utils.data.IterableDataset`, a streaming data set of Hugging
    Face, a WebDataset, a `DataLoader` or `StatefulDataLoader`, a list; or a function that makes an
    iterator, called with the number of the pass if it has a parameter for it. Their order is theirs
    to choose: shuffle there. `set_epoch(epoch)` of the data, or of their `dataset` or `sampler`, is
    called before each pass.

    A pass over the data, which is an epoch, ends when their iterator does, and the next pass starts
    another one. If `num_examples` is given, a pass has that many examples; data that give more, or
    never end, are read on where the pass before ended. The last batches of a pass are those of
    :class:`~hessianflow.data.streams.ExampleStream`: where the rest would be less than half a
    batch, it is shared evenly with the batch before. To know this where the length is unknown, half
    a batch more than the next one is read ahead; it stays in this process.

    A state continues without a repeat or a loss, at any batch size. If the data have `state_dict`
    and `load_state_dict`, the state holds theirs, from at most some thousand examples before the
    place (:data:`~hessianflow.data.stream_source.SNAPSHOT_EXAMPLES`) and those from there are read
    again. Otherwise, and in workers, the pass is read from its start and what was trained on is
    dropped, which takes as long as reading it. Both need data that give the same order again when
    a pass of the same number starts: a source whose order is not reproducible cannot be resumed. A
    warning says so where an example differs. The shuffle buffer of a Hugging Face data set is not
    in its state, which therefore loses examples: resume it with `by_count`. A plain generator gives
    one pass, and is resumed only by a new one.

    With several ranks, every rank reads all examples and takes its contiguous shard of each batch,
    as :class:`~hessianflow.data.streams.ExampleStream` describes. With `sharded`, the data give each
    rank a part of its own, of which it takes its share of each batch (shares differ by at most one
    example). Ranks whose parts end at different times would wait for each other, so `num_examples`
    over all ranks must be given: every rank makes the same number of batches, and a part that ends
    before its share is an error. Such a stream is resumed by counting.

    Args:
        dataset: The iterable data, or a function that makes an iterator.
        batch_size: Examples per batch over all ranks.
        num_examples: Examples of a pass, over all ranks; None if nobody knows, and the attribute
            `num_examples` then is `sys.maxsize`.
        batched: Whether each item of the data is a batch of any size, to be regrouped by its rows,
            and not an example. None: it is, if the data are a `DataLoader` with a batch size.
        sharded: Whether the data give each rank a part of its own.
        by_count: Resume by counting, even if the data have a state of their own.
        seed: Seed of what `collate_fn` draws, of the workers, and of what the data draw from the
            global generators as a pass starts (such as the order of a `DataLoader`). What they draw
            later in this process is theirs to repeat.
        num_workers: Number of processes that read; 0 reads in this one. Each worker reads the data
            itself: they must give each worker a part of its own, by `get_worker_info`, as the data
            sets of Hugging Face and WebDataset do. The order of the examples depends on the number
            of workers and on `chunk_size`.
        pin_memory: Make batches in page-locked memory, for an overlapping copy to a GPU.
        device: Device of the batches.
        transform: Function applied to every batch once it is on the device.
        collate_fn: Function that makes a batch of the list of its items (with several ranks, of the
            items of this rank's shard), in this process. None for torch's default.
        chunk_size: Examples that are read at a time.
        prefetch_examples: Examples to read ahead, over all workers.
        value_range: Lowest and highest valid input after `transform`, to clamp attacks; not used
            here.
        worker_init_fn: Function called in each worker with its number when it starts.
        persistent_workers: Keep the workers from one pass to the next.

    Raises:
        HessianFlowError: The data are not iterable, or a number is out of range; while iterating,
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
        self._num_examples = num_examples
        self._batch_size = self._checked_batch_size(batch_size)
        self._is_batched = batched
        self._is_sharded = sharded
        self._collate = None if collate_fn is default_collate else collate_fn
        self._randomness = Randomness(collate_fn)
        self._seed = seed
        self._transform = transform
        self.device = torch.device(device)
        self.value_range = value_range
        self._pin_memory = pin_memory
        is_stacked = num_workers > 0 and not batched and self._collate is None
        options = (num_workers, chunk_size, prefetch_examples, worker_init_fn, persistent_workers)
        self._reader = Reader(
            Source(dataset),
            seed=seed,
            is_batched=batched,
            chunk_size=chunk_size,
            pack=loading.stacked_chunk if is_stacked else loading.kept_chunk,
            by_count=by_count or sharded,
            options=loader_options(*options),
        )
        self._order = None
        if num_workers > 1:
            self._order = [num_workers, chunk_size]
        self._waiting: Items | Rows = Items()
        if batched:
            self._waiting = Rows(take_rows)
        elif is_stacked:
            self._waiting = Rows(lambda batch, rows, _: loading.rows_of(batch, rows))
        self._is_stacked = is_stacked
        self._last: tuple[int, list[Any]] | None = None
        self._epoch = self._cursor = self._lap = self._position = 0
        self._rank = 0
        self._world_size = 1

    @property
    def num_examples(self) -> int:
        """Return the number of examples of a pass, or `sys.maxsize` if it is not known."""
        return sys.maxsize if self._num_examples is None else self._num_examples

    @property
    def batch_size(self) -> int:
        """Return the number of examples per batch, over all ranks."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """Return the number of completed passes."""
        return self._epoch

    @property
    def cursor(self) -> int:
        """Return how many examples of the current pass all ranks have handed out so far."""
        return self._cursor

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on; the workers continue."""
        self._batch_size = self._checked_batch_size(batch_size)

    def set_shard(self, rank: int, world_size: int) -> None:
        """Yield only this rank's share of every batch, from the very next batch on.

        Raises:
            HessianFlowError: `rank` lies outside [0, world_size), or the number of ranks of a
                sharded stream changes after its start.
        """
        if not 0 <= rank < world_size:
            raise HessianFlowError(
                f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}"
            )
        if self._is_sharded and (rank, world_size) != (self._rank, self._world_size):
            if self._position > 0:
                raise HessianFlowError(
                    f"the parts of a sharded stream are those of {self._world_size} ranks, got"
                    f" rank {rank} of {world_size} after {self._position} examples: set the shard"
                    " before the first batch"
                )
            self._waiting.clear()
            self._reader.go_to(self._lap, 0)
        self._rank = rank
        self._world_size = world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values and, where the data have one, a state of theirs."""
        state = {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "batch_size": self._batch_size,
            "lap": self._lap,
            "position": self._position,
            "at": [self._epoch, self._cursor],
            "identity": self._identity(),
        }
        snapshot = self._reader.snapshot(max(self._position - 1, 0))
        if snapshot is not None:
            state["source"] = list(snapshot)
        if self._last is not None and self._keeps_marks:
            state["mark"] = fingerprint(self._last[1][-1])
        return state

    @property
    def _keeps_marks(self) -> bool:
        return isinstance(self._waiting, Items)

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same in the stream that continues a state."""
        ranks = self._world_size if self._is_sharded else None
        return {
            "source": self._reader.source.name,
            "num_examples": self._num_examples,
            "workers and chunk_size": self._order,
            "ranks with parts of their own": ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of `state`, at its batch size.

        Raises:
            HessianFlowError: The state is of another stream, incomplete or out of range, or the
                data cannot be started again.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise HessianFlowError(f"this is no state of a stream: it lacks {', '.join(missing)}")
        for what, mine in self._identity().items():
            saved = state["identity"].get(what)
            if saved != mine:
                raise HessianFlowError(
                    f"the saved stream had {saved!r} as {what}, this one has {mine!r}: cannot resume"
                )
        epoch = int(state["epoch"])
        cursor = int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= self.num_examples:
            raise HessianFlowError(
                f"the position of a stream must lie within {self.num_examples} examples, got epoch"
                f" {epoch}, cursor {cursor}: the state is damaged"
            )
        batch_size = self._checked_batch_size(int(state["batch_size"]))
        lap, position = self._place_of(epoch, cursor, state)
        mark = state.get("mark") if [epoch, cursor] == list(state["at"]) else None
        self._seek(lap, position, state.get("source"), mark)
        self._batch_size = batch_size
        self._epoch = epoch
        self._cursor = cursor

    def _place_of(self, epoch: int, cursor: int, state: Mapping[str, Any]) -> tuple[int, int]:
        """Return lap and position of a place, which may be near that where the state was taken."""
        if self._num_examples is None:
            return epoch, cursor
        taken_epoch, taken_cursor = state["at"]
        passed = (epoch - taken_epoch) * self._num_examples + cursor - taken_cursor
        position = int(state["position"]) + passed
        if position < 0:
            raise HessianFlowError(
                f"the place epoch {epoch}, cursor {cursor} lies before the start of what is read"
                " now: a stream cannot go back so far"
            )
        return int(state["lap"]), position

    def _seek(self, lap: int, position: int, source: Any, mark: Any) -> None:
        """Read next from a place, and go there without reading again if that is possible."""
        reader = self._reader
        own = self._own(position)
        first = reader.position - len(self._waiting)
        if self._last is not None and (lap, own) == (self._lap, self._last[0]):
            self._waiting.put_back(self._last[1])
        elif lap == reader.lap and first <= own <= reader.position:
            self._waiting.take(own - first)
        else:
            snapshot = None
            if source is not None and source[0] <= own:
                snapshot = (int(source[0]), source[1])
            reader.go_to(lap, own, snapshot, mark)
            self._waiting.clear()
        self._last = None
        self._lap = lap
        self._position = position

    def rewind(self) -> None:
        """Return to the first example of the current pass, if the data can be started again.

        Raises:
            HessianFlowError: They cannot.
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
        self._last = None
        if self._num_examples is None:
            self._begin_lap()

    def _begin_lap(self) -> None:
        self._lap += 1
        self._position = 0
        self._reader.start_lap(self._lap)

    def _next_size(self) -> int:
        if self._num_examples is not None:
            return next_size(self._num_examples - self._cursor, self._batch_size)
        needed = examples_to_judge(self._batch_size)
        self._fill(needed)
        left = len(self._waiting)
        if left == 0 and self._cursor == 0:
            raise self._is_empty()
        return next_size(left, self._batch_size)

    def _own(self, position: int) -> int:
        """Return how many of the first examples of a lap are this rank's to read."""
        if not self._is_sharded:
            return position
        return (position - self._rank + self._world_size - 1) // self._world_size

    def _batch(self, size: int) -> Batch:
        """Take the next `size` examples and return this rank's share; after an error they wait."""
        start = self._own(self._position)
        count = self._own(self._position + size) - start
        at_end = self._fill(count) and not self._waiting
        if at_end and self._cursor == 0 and self._position > 0:
            self._begin_lap()  # the pass before ended where the data did
            start = 0
            count = self._own(size)
            self._fill(count)
        if len(self._waiting) < count:
            raise self._ended_early(start + len(self._waiting))
        taken = self._waiting.take(count)
        try:
            batch = self._finished(self._made(taken, size))
        except BaseException:
            self._waiting.put_back(taken)
            raise
        if taken:
            self._last = (start, taken)
        return batch

    def _fill(self, count: int) -> bool:
        """Read until `count` examples wait; return whether the lap has ended before."""
        while len(self._waiting) < count:
            chunk = self._reader.next_chunk()
            if chunk is None:
                return True
            self._waiting.add(*chunk)
        return False

    def _is_empty(self) -> HessianFlowError:
        return HessianFlowError(
            f"the stream {self._reader.source.name} is empty: at least one example is needed in"
            f" pass {self._epoch + 1}; an iterator that was read before gives nothing again"
        )

    def _ended_early(self, own: int) -> HessianFlowError:
        """Return the error for data that gave `own` examples of a lap and no more."""
        if self._reader.position == 0:
            return self._is_empty()
        where = "all of them" if not self._is_sharded else f"those of rank {self._rank}"
        return HessianFlowError(
            f"the stream {self._reader.source.name} ended early, after {own} examples ({where}) and"
            f" {self._cursor} of the {self._num_examples} that num_examples states for pass"
            f" {self._epoch + 1}: correct num_examples, or leave it out"
        )

    def _made(self, taken: list[Any], size: int) -> Any:
        """Return the batch of what was taken; that of this rank's contiguous shard of it."""
        first = 0
        last = size
        if self._is_sharded:
            last = self._own(self._position + size) - self._own(self._position)
        elif self._world_size > 1:
            first = size * self._rank // self._world_size
            last = size * (self._rank + 1) // self._world_size
        if last == first:
            return self._without_rows(taken)
        if isinstance(self._waiting, Items):
            return self._collated(taken[first:last], self._epoch, self._cursor)
        whole = self._joined(taken)
        count = sum(n for n, _ in taken)
        if (first, last) == (0, count):
            return to_device(whole, self.device, non_blocking=self._pin_memory)
        part = take_rows(whole, slice(first, last), count)
        return to_device(part, self.device, non_blocking=self._pin_memory)

    def _joined(self, pieces: list[Any]) -> Any:
        if self._is_stacked:
            whole = loading.joined([part for _, part in pieces])
        else:
            whole = join(pieces)
        if self._pin_memory:
            whole = map_tensors(lambda t: t.pin_memory(), whole)
        return whole

    def _without_rows(self, taken: list[Any]) -> Any:
        """Return an empty batch: that of one example without its one row."""
        if not taken and self._last is None:
            self._fill(1)
            taken = self._waiting.take(1)
            self._waiting.put_back(taken)
        elif not taken and self._last is not None:
            taken = self._last[1]
        if isinstance(self._waiting, Items):
            one = self._collated(taken[:1], self._epoch, self._cursor)
            return take_rows(one, slice(0, 0), 1)
        count, part = taken[0]
        return to_device(take_rows(part, slice(0, 0), count), self.device)

    def _collated(self, items: list[Any], *key: int) -> Any:
        """Return a batch of items on the device; `collate_fn` draws by pass and place alone."""
        if self._collate is None:
            batch = loading.stacked(items)
        else:
            with self._randomness.kept():
                self._randomness.seed(self._seed, "collate", *key)
                batch = self._collate(items)
        if self._pin_memory:
            batch = map_tensors(lambda t: t.pin_memory(), batch)
        return to_device(batch, self.device, non_blocking=self._pin_memory)

    def _finished(self, batch: Any) -> Batch:
        if is_list(batch):
            batch = tuple(batch)
        return batch if self._transform is None else self._transform(batch)

    def sample(self, count: int) -> Batch:
        """Return the next `count` examples, for a curvature probe; the stream does not move.

        They are read ahead and kept. All ranks get the same ones, unless the stream is sharded.

        Raises:
            HessianFlowError: The pass has fewer examples left.
        """
        if count < 1:
            raise HessianFlowError(f"count must be at least 1, got {count}")
        self._fill(count)
        if len(self._waiting) < count:
            raise HessianFlowError(
                f"count must not exceed the {len(self._waiting)} examples that are left of this"
                f" pass, got {count}"
            )
        return self._peeked(count)

    def _peeked(self, count: int) -> Batch:
        taken = self._waiting.take(count)
        try:
            if isinstance(self._waiting, Items):
                return self._finished(self._collated(taken, self._epoch, self._cursor))
            return self._finished(to_device(self._joined(taken), self.device))
        finally:
            self._waiting.put_back(taken)

    def check_rows(self) -> None:
        """Refuse a `collate_fn` whose batches cannot be cut into rows, and name the entry.

        The examples are read ahead and kept, see :meth:`AdaptiveBatches.check_rows`.
        """
        if self._collate is None:
            return
        self._fill(max(COMPARED_SIZES))
        for size in COMPARED_SIZES:
            if size <= len(self._waiting):
                taken = self._waiting.take(size)
                self._waiting.put_back(taken)
                batch = self._collated(taken, self._epoch, self._cursor)
                whole = tuple(batch) if is_list(batch) else batch
                take_rows(whole, slice(1), size)

    def _checked_batch_size(self, batch_size: int) -> int:
        if batch_size < 1:
            raise HessianFlowError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size != int(batch_size):
            raise HessianFlowError(f"batch_size must be a whole number, got {batch_size!r}")
        if batch_size > self.num_examples:
            raise HessianFlowError(
                f"batch_size must not exceed the {self.num_examples} examples of a pass, got"
                f" {batch_size}: choose a smaller batch, or a smaller maximum for the controller"
            )
        return int(batch_size)


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
        fault = f"num_examples must be at least 1, or None if nobody knows, got {num_examples}"
    elif seed < 0:
        fault = f"seed must be at least 0, got {seed}"
    elif sharded and num_examples is None:
        fault = (
            "sharded=True needs num_examples, over all ranks: ranks whose parts end at different"
            " times would wait for each other"
        )
    elif batched and collate_fn is not None:
        fault = (
            "collate_fn makes a batch of single examples, and with batched=True the data give"
            " batches: leave one of them out"
        )
    elif num_workers > 0 and isinstance(dataset, DataLoader):
        fault = (
            f"num_workers must be 0 for a {type(dataset).__name__}, which has workers of its own,"
            f" got {num_workers}"
        )
    elif num_workers > 0 and isinstance(dataset, Iterator):
        fault = (
            f"num_workers must be 0 for a {type(dataset).__name__}, which cannot be sent to"
            f" workers, got {num_workers}: pass the function that makes it"
        )
    if fault:
        raise HessianFlowError(fault)
