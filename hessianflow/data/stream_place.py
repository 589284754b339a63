"""The place in a stream of examples, which its state holds."""

import sys
from collections.abc import Mapping
from typing import Any

from hessianflow.data.stream_making import BatchMaker
from hessianflow.data.stream_reader import Reader
from hessianflow.interfaces import HessianFlowError

STATE_KEYS = ("epoch", "cursor", "batch_size", "lap", "position", "at", "identity")


class StreamPlace:
    """A place in the passes over a stream, and the examples that were read beyond it.

    Two counts differ where `num_examples` is given: passes are counted by it, and laps by the ends
    of the source. A place is the pass and the examples of it that were handed out, over all ranks;
    the examples of the lap before it are what a resume goes by.

    Args:
        reader: What reads the stream.
        maker: What makes the batches.
        batch_size: Examples per batch over all ranks.
        num_examples: Examples of a pass; None if nobody knows.
        sharded: Whether the source gives each rank a part of its own.
    """

    def __init__(
        self,
        reader: Reader,
        maker: BatchMaker,
        batch_size: int,
        num_examples: int | None,
        *,
        sharded: bool,
    ) -> None:
        self._reader = reader
        self._maker = maker
        self._num_examples = num_examples
        self._batch_size = self._checked_batch_size(batch_size)
        self._is_sharded = sharded
        self._waiting = self._maker.queue()
        self._last: tuple[int, list[Any]] | None = None  # the start and examples of the last batch
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
        if self._last is not None:
            state["mark"] = self._maker.mark(self._last[1])
        return state

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same in the stream that continues a state."""
        ranks = self._world_size if self._is_sharded else None
        return {
            "source": self._reader.source.name,
            "num_examples": self._num_examples,
            "workers and chunk_size": self._reader.order,
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
                    f"the saved stream had {saved!r} as {what}, this one has {mine!r}: cannot"
                    " resume"
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

    def _begin_lap(self) -> None:
        self._lap += 1
        self._position = 0
        self._last = None
        self._reader.start_lap(self._lap)

    def _own(self, position: int) -> int:
        """Return how many of the first examples of a lap are this rank's to read."""
        if not self._is_sharded:
            return position
        return (position - self._rank + self._world_size - 1) // self._world_size

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
