"""Read a stream of unknown length in order, from any place, in this process or in workers.

A lap is one iteration of the source, from its start to its end. The reader returns to a place by
the source's own state where it has one, else by counting: it starts the lap again and drops what
was read before. Workers drop their part without sending it.
"""

import inspect
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hessianflow.batches import num_examples, take_rows
from hessianflow.data import loading
from hessianflow.data.fingerprint import fingerprint
from hessianflow.data.randomness import Randomness
from hessianflow.data.regroup import consumed
from hessianflow.data.streams import stream_seed
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

SNAPSHOT_EXAMPLES = 1024
"""Examples from one state of the source that is remembered to the next. This is our choice: more
of them cost time while training, fewer of them cost time at a resume."""

Chunk = tuple[int, Any]
"""A number of examples and a list of them, or a batch of them."""


class Source:
    """An iterable, or a function that makes an iterator, which is started once for each lap.

    Raises:
        HessianFlowError: It is neither.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.is_function = callable(data) and not isinstance(data, Iterable)
        if not self.is_function and not isinstance(data, Iterable):
            raise HessianFlowError(
                "dataset must be iterable data, or a function that makes an iterator, got"
                f" {article(data)}"
            )
        methods = (getattr(data, name, None) for name in ("state_dict", "load_state_dict"))
        self.has_state = not self.is_function and all(map(callable, methods))
        self.is_once = isinstance(data, Iterator) and not self.has_state
        self._was_begun = False

    @property
    def name(self) -> str:
        """Return what the source is, for messages and states."""
        return getattr(self.data, "__qualname__", type(self.data).__qualname__)

    @property
    def can_begin(self) -> bool:
        """Return whether the next lap can be started, which a plain generator allows once."""
        return not (self.is_once and self._was_begun)

    def cannot_begin(self) -> HessianFlowError:
        """Return the error for a plain generator that is to be started again."""
        return HessianFlowError(
            f"{article(self.data)} cannot be started again, neither for another pass nor to go"
            " back: pass the function that makes it instead of what it returns"
        )

    def begin(self, lap: int) -> Iterator[Any]:
        """Start a lap, after telling its number to whatever has a `set_epoch`."""
        if not self.can_begin:
            raise self.cannot_begin()
        self._was_begun = True
        if self.is_function:
            if _takes_a_number(self.data):
                return iter(self.data(lap))
            return iter(self.data())
        inner = [getattr(self.data, name, None) for name in ("dataset", "sampler")]
        for part in (self.data, *inner):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(lap)
        return iter(self.data)


def _takes_a_number(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C may have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in parameters)


class WorkerChunks(IterableDataset[Any]):
    """What a worker sends in each lap: the number of examples that it dropped, then its chunks.

    Args:
        source: What it reads.
        chunk_size: Examples in a chunk.
        pack: Function that makes a chunk of a list of examples; None if each item of the source is
            a batch, which is sent as it is.

    Attributes:
        place: The lap to read next, and the examples that each worker drops at its start; int64
            [2] in shared memory, so that it reaches workers that stay from one lap to the next.
    """

    def __init__(
        self, source: Source, chunk_size: int, pack: Callable[[list[Any]], Any] | None
    ) -> None:
        self._source = source
        self._chunk_size = chunk_size
        self._pack = pack
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Any]:
        lap, skipped = self.place.tolist()
        items = self._source.begin(lap)
        yield consumed(items, skipped)[0]
        if self._pack is None:
            yield from ((num_examples(batch), batch) for batch in items)
            return
        while chunk := list(islice(items, self._chunk_size)):
            yield self._pack(chunk)


class Reader:
    """Reads the chunks of a source in order, and goes to any place of it.

    Args:
        source: What is read.
        seed: Seed of what the source draws from the global generators when a lap starts, such as
            the order of a `DataLoader`, and of the workers.
        is_batched: Whether each item of the source is a batch.
        chunk_size: Examples that are read at a time.
        pack: Function that makes a chunk of a list of examples in a worker.
        by_count: Whether a state of the source is left alone.
        options: Arguments of the `DataLoader`; without workers none is made.

    Attributes:
        lap: Number of the lap that is read.
        has_ended: Whether the lap has no further examples.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        is_batched: bool,
        chunk_size: int,
        pack: Callable[[list[Any]], Any],
        by_count: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.source = source
        self.lap = 0
        self.has_ended = False
        self._read_so_far = 0
        self._drop_to = 0
        self._mark: int | None = None
        self._seed = seed
        self._is_batched = is_batched
        self._is_stacked = pack is loading.stacked_chunk and options["num_workers"] > 0
        self._chunk_size = chunk_size
        self._num_workers: int = options["num_workers"]
        self._by_count = by_count or not source.has_state or self._num_workers > 0
        self._snapshots: deque[tuple[int, Any]] = deque()
        self._start: tuple[int, Any] | None = None  # a snapshot to start from
        self._is_loaded = False
        self._is_partial = False  # whether the last iteration was left before its end
        self._fresh: tuple[int, Any] | None = None  # a lap and the state at its start
        self._items: Iterator[Any] | None = None
        self._sent = WorkerChunks(source, chunk_size, None if is_batched else pack)
        self._options = {**options, "batch_size": None, "collate_fn": _as_it_is}
        self._loader: DataLoader[Any] | None = None
        self._ending: weakref.finalize[..., Reader] | None = None

    @property
    def position(self) -> int:
        """Return how many examples of the lap lie before the next chunk."""
        return max(self._read_so_far, self._drop_to)

    def start_lap(self, lap: int) -> None:
        """Read next from the start of `lap`, after the end of the one before."""
        self.lap = lap
        self._drop_to = self._read_so_far = 0
        self._start = self._mark = None
        self._snapshots.clear()
        self.has_ended = self._is_loaded = False

    def go_to(
        self,
        lap: int,
        position: int,
        snapshot: tuple[int, Any] | None = None,
        mark: int | None = None,
    ) -> None:
        """Read next from `position` of `lap`; the source is started with the next chunk.

        Args:
            lap: Number of the lap.
            position: Examples of the lap before the place.
            snapshot: Place of a state of the source in the lap, not after `position`, and that
                state; None to start from the beginning of the lap.
            mark: Fingerprint of the example before the place, if it is known.

        Raises:
            HessianFlowError: The source cannot be started again, or its own state, from which it
                was started, lies behind the place.
        """
        if not self.source.can_begin:
            if lap != self.lap or position < self.position:
                raise self.source.cannot_begin()
            self._drop_to = position
            return
        if snapshot is None and self._is_loaded and lap == self.lap:
            raise HessianFlowError(
                f"{self.source.name} was resumed from a state of its own, and cannot go back to"
                f" example {position} before it: load that state again"
            )
        self.close()
        self.start_lap(lap)
        self._start = snapshot
        self._drop_to = position
        self._mark = mark

    def next_chunk(self) -> Chunk | None:
        """Return the next examples, or None at the end of the lap.

        Raises:
            HessianFlowError: A worker has died, an example is refused, the source cannot be started
                again, or the lap ends before the place to go to.
        """
        if self.has_ended:
            return None
        try:
            chunk = self._chunk()
        except BaseException as error:
            self._stay()
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                reason = str(error).splitlines()[0]
                raise HessianFlowError(
                    f"a worker of the stream {self.source.name} died ({reason}): it may lack"
                    " memory, or its data end the process; try num_workers=0"
                ) from error
            raise
        if chunk is None:
            self.has_ended = True
            self._is_partial = False
            self._items = None
            self._detach()
        return chunk

    def _stay(self) -> None:
        """Read next from the same place, after an error: an iterator that failed gives no more."""
        self._drop_to = self.position
        self._read_so_far = 0
        start = self._start
        self.close()
        if self._snapshots:
            start = self._snapshots[-1]
        self._start = start

    def _chunk(self) -> Chunk | None:
        if self._items is None:
            with Randomness(None).kept():
                chunk = self._opened()
        else:
            chunk = self._read()
        while chunk is not None and self._read_so_far + chunk[0] <= self._drop_to:
            self._read_so_far += chunk[0]
            chunk = self._read()
        if chunk is not None:
            return self._without_dropped(chunk)
        if self._read_so_far < self._drop_to:
            raise HessianFlowError(
                f"{self.source.name} ended after {self._read_so_far} examples, before the place"
                f" {self._drop_to} to go to: this is another stream, or it has changed"
            )
        return None

    def _without_dropped(self, chunk: Chunk) -> Chunk:
        """Count a chunk, and return it without what lies before the place to go to."""
        count, payload = chunk
        surplus = max(self._drop_to - self._read_so_far, 0)
        self._read_so_far += count
        if surplus == 0:
            return chunk
        rows = slice(surplus, count)
        if self._is_batched:
            return count - surplus, take_rows(payload, rows, count)
        if isinstance(payload, list) and not self._is_stacked:
            return count - surplus, payload[rows]
        return count - surplus, loading.rows_of(payload, rows)

    def _opened(self) -> Chunk | None:
        """Start the lap and return its first chunk, with what it draws seeded by its number."""
        Randomness(None).seed(self._seed, "workers", self.lap)
        self._snapshots.clear()
        self._read_so_far = 0
        if self._num_workers > 0:
            return self._opened_in_workers()
        self._prepare()
        self._items = self.source.begin(self.lap)
        if not self._is_batched:
            count, last = consumed(self._items, self._drop_to - self._read_so_far)
            self._read_so_far += count
            if self._read_so_far < self._drop_to:
                return None
            self._compare(last, count)
        return self._read()

    def _prepare(self) -> None:
        """Put the source to the snapshot to start from, or to the start of the lap."""
        data = self.source.data
        start = self._start
        self._is_loaded = start is not None
        if start is not None:
            data.load_state_dict(start[1])
            self._read_so_far = start[0]
            self._snapshots.append(start)
        elif self.source.has_state and not isinstance(data, DataLoader):
            fresh = self._fresh
            if not self._is_partial:
                self._fresh = (self.lap, data.state_dict())
            elif fresh is not None and fresh[0] == self.lap and fresh[1]:
                data.load_state_dict(fresh[1])
        self._is_partial = True

    def _compare(self, example: Any, count: int) -> None:
        """Warn if the example before the place is not the one that was there."""
        mark = self._mark
        self._mark = None
        if count > 0 and mark is not None and fingerprint(example) != mark:
            warnings.warn(
                f"example {self._drop_to - 1} of {self.source.name} differs from the one that was"
                " there before: either the data change their examples at random, or their order"
                " cannot be reproduced, and examples are lost and repeated (where a shuffle buffer"
                " is not in the state of the data, use by_count=True)",
                stacklevel=2,
            )

    def _opened_in_workers(self) -> Chunk | None:
        skipped = 0
        if not self._is_batched:
            rounds = self._drop_to // (self._num_workers * self._chunk_size)
            skipped = rounds * self._chunk_size
        self._sent.place.copy_(torch.tensor([self.lap, skipped]))
        if self._loader is None:
            self._options["generator"] = torch.Generator()  # else one draws from the global one
            self._loader = DataLoader(self._sent, **self._options)
        seed = stream_seed(self._seed, "workers", self.lap)
        self._options["generator"].manual_seed(seed)
        self._items = iter(self._loader)
        self._ending = weakref.finalize(self, loading.end_workers, self._items, os.getpid())
        self._ending.atexit = False
        for _ in range(self._num_workers):
            self._read_so_far += next(self._items)
        return self._read()

    def _read(self) -> Chunk | None:
        """Return the next chunk as it comes, and remember the state before it now and then."""
        assert self._items is not None
        if self._num_workers > 0:
            return self._received()
        before = self._due_snapshot()
        chunk: Chunk | None = None
        if self._is_batched:
            for batch in self._items:
                chunk = num_examples(batch), batch
                break
        elif items := list(islice(self._items, self._chunk_size)):
            chunk = len(items), items
        # A state at the end of a lap would start the next one.
        if chunk is not None and before is not None:
            self._snapshots.append(before)
        return chunk

    def _received(self) -> Chunk | None:
        chunk = next(self._items, None)  # type: ignore[arg-type]
        if isinstance(chunk, HessianFlowError):
            raise chunk
        if chunk is None:
            return None
        count, payload = chunk
        if isinstance(payload, loading.Packed):
            payload = payload.unpacked()
        return count, payload

    def _due_snapshot(self) -> tuple[int, Any] | None:
        place = self._read_so_far
        if self._by_count or place == 0:
            return None
        if self._snapshots and place - self._snapshots[-1][0] < SNAPSHOT_EXAMPLES:
            return None
        return place, self.source.data.state_dict()

    def snapshot(self, position: int) -> tuple[int, Any] | None:
        """Return the newest state remembered that lies before `position`, and forget older ones."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= position:
            self._snapshots.popleft()
        newest = self._start
        if self._snapshots:
            newest = self._snapshots[0]
        if newest is None or newest[0] > position:
            return None
        return newest

    def close(self) -> None:
        """Leave the lap, and end the workers of an unfinished one."""
        if self._ending is not None:
            self._ending()  # else it would wait for each worker
            self._loader = None
        self._detach()
        self._items = None
        self._start = None

    def _detach(self) -> None:
        if self._ending is not None:
            self._ending.detach()
            self._ending = None


def _as_it_is(chunk: Any) -> Any:
    return chunk


def loader_options(
    num_workers: int,
    chunk_size: int,
    prefetch_examples: int,
    worker_init_fn: Callable[[int], None] | None,
    persistent_workers: bool,
) -> dict[str, Any]:
    """Return the arguments of the `DataLoader` that runs the workers."""
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "worker_init_fn": partial(loading.start_worker, worker_init_fn),
    }
    if num_workers:
        chunks = -(-prefetch_examples // (chunk_size * num_workers))
        options["prefetch_factor"] = max(2, chunks)
        options["persistent_workers"] = persistent_workers
    return options
