"""Read a stream of unknown length in order, from any place, in this process or in workers.

The reader returns to a place by the source's own state if there is one. Otherwise it counts: it
starts the lap again and drops the examples before the place. Workers drop theirs without sending.
"""

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from hessianflow.batches import num_examples, take_rows
from hessianflow.data import loading
from hessianflow.data.randomness import Randomness
from hessianflow.data.regroup import consumed
from hessianflow.data.stream_making import BatchMaker
from hessianflow.data.stream_source import Chunk, Source, WorkerChunks, as_it_is
from hessianflow.data.streams import stream_seed
from hessianflow.interfaces import HessianFlowError

SNAPSHOT_EXAMPLES = 1024
"""Examples between two remembered states of the source. Our choice; taking a state costs time."""


class Reader:
    """Reads the chunks of a source in order, and goes to any place of it.

    Args:
        source: The source to read.
        maker: The maker of batches, which decides the form of the chunks.
        seed: Seed of the workers, and of everything that the source draws from the global
            generators when a lap starts, such as the order of a `DataLoader`.
        chunk_size: Least number of examples that are read at a time.
        by_count: Whether to ignore a state of the source and count.
        options: Arguments of the `DataLoader` that runs the workers.

    Attributes:
        lap: Number of the lap that is being read.
        has_ended: Whether the lap has no further examples.
    """

    def __init__(
        self,
        source: Source,
        maker: BatchMaker,
        *,
        seed: int,
        chunk_size: int,
        by_count: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.source = source
        self.lap = 0
        self.has_ended = False
        self._read_so_far = 0
        self._drop_to = 0
        self._mark: int | None = None
        self._wanted = 0
        self._seed = seed
        self._maker = maker
        self._chunk_size = chunk_size
        self._is_batched = not maker.takes_items and not maker.is_stacked
        self._num_workers: int = options["num_workers"]
        self._by_count = by_count or not source.has_state or self._num_workers > 0
        self._snapshots: deque[tuple[int, Any]] = deque()
        self._start: tuple[int, Any] | None = None  # a snapshot to start from
        self._is_loaded = False
        self._is_partial = False  # whether the last iteration was left before its end
        self._fresh: tuple[int, Any] | None = None  # a lap and the state at its start
        self._items: Iterator[Any] | None = None
        self._sent = WorkerChunks(source, chunk_size, self._pack())
        self._options = {**options, "batch_size": None, "collate_fn": as_it_is}
        self._loader: DataLoader[Any] | None = None
        self._ending: weakref.finalize[..., Reader] | None = None

    def _pack(self) -> Callable[[list[Any]], Any] | None:
        """Return the function that packs a chunk in a worker; None for a source of batches."""
        if self._is_batched:
            return None
        if self._maker.is_stacked:
            return loading.stacked_chunk
        return loading.kept_chunk

    @property
    def order(self) -> list[int] | None:
        """Return the settings that the order of the examples depends on; None if on none."""
        if self._num_workers > 1:
            return [self._num_workers, self._chunk_size]
        return None

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
            snapshot: A place in the lap, not after `position`, and the state of the source there;
                None to start from the beginning of the lap.
            mark: Fingerprint of the example before the place, if it is known.

        Raises:
            HessianFlowError: The source cannot be started again, or it was started from a state of
                its own that lies after the place.
        """
        if not self.source.can_begin:
            if lap != self.lap or position < self.position:
                raise self.source.cannot_begin()
            self._drop_to = position
            return
        has_fresh = self._fresh is not None and self._fresh[0] == lap
        if snapshot is None and self._is_loaded and lap == self.lap and not has_fresh:
            raise HessianFlowError(
                f"{self.source.name} was resumed from a state of its own and cannot go back before"
                f" it, to example {position}: load that state again"
            )
        self.close()
        self.start_lap(lap)
        self._start = snapshot
        self._drop_to = position
        self._mark = mark

    def next_chunk(self, wanted: int) -> Chunk | None:
        """Return the next examples, or None at the end of the lap.

        Without workers, at least `wanted` examples are read in one piece, and stacked at once if
        possible, because it is slower to stack objects that have waited.

        Raises:
            HessianFlowError: A worker has died, an example is refused, the source cannot be started
                again, or the lap ends before the place to go to.
        """
        if self.has_ended:
            return None
        self._wanted = wanted
        try:
            chunk = self._chunk()
        except BaseException as error:
            self._stay()
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                reason = str(error).splitlines()[0]
                raise HessianFlowError(
                    f"a worker of the stream {self.source.name} died ({reason}): it may have run"
                    " out of memory, or its data may end the process; try num_workers=0"
                ) from error
            raise
        if chunk is None:
            self.has_ended = True
            self._is_partial = False
            self._items = None
            self._detach()
        return chunk

    def _stay(self) -> None:
        """Read next from the same place after an error; an iterator that failed gives no more."""
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
                f"{self.source.name} ended after {self._read_so_far} examples, before example"
                f" {self._drop_to} to resume at: give the stream that the state was saved from"
            )
        return None

    def _without_dropped(self, chunk: Chunk) -> Chunk:
        """Count a chunk, and return it without the examples before the place to go to."""
        count, payload = chunk
        surplus = max(self._drop_to - self._read_so_far, 0)
        self._read_so_far += count
        if surplus == 0:
            return chunk
        rows = slice(surplus, count)
        if self._is_batched:
            return count - surplus, take_rows(payload, rows, count)
        if self._maker.takes_items:
            return count - surplus, payload[rows]
        return count - surplus, loading.rows_of(payload, rows)

    def _opened(self) -> Chunk | None:
        """Start the lap and return its first chunk; the number of the lap seeds all draws."""
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
        """Put the source at the snapshot to start from, or at the start of the lap."""
        data = self.source.data
        start = self._start
        if start is None and self._fresh is not None and self._fresh[0] == self.lap:
            start = (0, self._fresh[1])
        self._is_loaded = start is not None and start[0] > 0
        if start is not None:
            data.load_state_dict(start[1])
            self._read_so_far = start[0]
        elif self.source.has_state and not self._is_partial:
            start = (0, data.state_dict())
        if start is not None and start[1]:
            self._snapshots.append(start)
            if start[0] == 0:
                self._fresh = (self.lap, start[1])
        self._is_partial = True

    def _compare(self, example: Any, count: int) -> None:
        """Warn if the example before the place differs from the one that was there before."""
        mark = self._mark
        self._mark = None
        if count > 0 and mark is not None and self._maker.mark_of(example) != mark:
            warnings.warn(
                f"example {self._drop_to - 1} of {self.source.name} differs from the one that was"
                " there before: either the data change their examples at random, or they do not"
                " repeat their order, so that examples are lost and repeated (if the state of the"
                " data lacks their shuffle buffer, use by_count=True)",
                stacklevel=2,
            )

    def _opened_in_workers(self) -> Chunk | None:
        skipped = 0
        if not self._is_batched:
            rounds = self._drop_to // (self._num_workers * self._chunk_size)
            skipped = rounds * self._chunk_size
        self._sent.place.copy_(torch.tensor([self.lap, skipped]))
        if self._loader is None:
            self._options["generator"] = torch.Generator()  # spares the global one
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
        """Return the next chunk, and remember the state of the source before it if one is due."""
        assert self._items is not None
        if self._num_workers > 0:
            return self._received()
        before = self._due_snapshot()
        chunk: Chunk | None = None
        if self._is_batched:
            for batch in self._items:
                chunk = num_examples(batch), batch
                break
        elif items := list(islice(self._items, max(self._chunk_size, self._wanted))):
            chunk = len(items), items
            if self._maker.is_stacked:
                chunk = len(items), loading.stacked(items)
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
        """Return the newest remembered state before `position`, and forget older ones."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= position:
            self._snapshots.popleft()
        newest = self._start
        if self._snapshots:
            newest = self._snapshots[0]
        elif newest is None and self._fresh is not None and self._fresh[0] == self.lap:
            newest = (0, self._fresh[1])
        if newest is None or newest[0] > position or self._by_count:
            return None
        return newest

    def close(self) -> None:
        """Leave the lap, and end the workers of an unfinished one."""
        if self._ending is not None:
            self._ending()  # otherwise closing would wait for each worker
            self._loader = None
        self._detach()
        self._items = None
        self._start = None

    def _detach(self) -> None:
        if self._ending is not None:
            self._ending.detach()
            self._ending = None
