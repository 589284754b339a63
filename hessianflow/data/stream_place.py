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

    If `num_examples` is given, passes and laps differ: a pass ends after that many examples, and a
    lap when the source ends. A place is a pass and the number of its examples that were handed out,
    over all ranks. Resuming goes by the number of examples of the lap that lie before the place.

    Args:
        reader: The reader of the stream.
        maker: The maker of the batches.
        batch_size: Examples per batch over all ranks.
        num_examples: Examples of a pass; None if it is unknown.
        sharded: Whether the source gives each rank its own part.
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
        self._epoch = 0
        self._cursor = 0
        self._lap = 0
        self._position = 0
        self._rank = 0
        self._world_size = 1

    @property
    def num_examples(self) -> int:
        """Return the number of examples of a pass, or `sys.maxsize` if it is not known."""
        if self._num_examples is None:
            return sys.maxsize
        return self._num_examples

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
        """Return how many examples of the current pass were handed out so far, over all ranks."""
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
        """Return the position as plain values, with a state of the data if they have one."""
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
        """Return everything that must be the same in the stream that continues a state."""
        ranks = None
        if self._is_sharded:
            ranks = self._world_size
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
            raise HessianFlowError(
                f"this is not a state of a stream: it lacks {', '.join(missing)}; load one that"
                " state_dict() of a StreamBatches returned"
            )
        for what, mine in self._identity().items():
            saved = state["identity"].get(what)
            if saved != mine:
                raise HessianFlowError(
                    f"the saved stream had {saved!r} as {what}, this one has {mine!r}: make it as"
                    " the saved one to resume"
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
        mark = None
        if [epoch, cursor] == list(state["at"]):
            mark = state.get("mark")
        self._seek(lap, position, state.get("source"), mark)
        self._batch_size = batch_size
        self._epoch = epoch
        self._cursor = cursor

    def _place_of(self, epoch: int, cursor: int, state: Mapping[str, Any]) -> tuple[int, int]:
        """Return lap and position of a place, which may differ from that of the state."""
        if self._num_examples is None:
            return epoch, cursor
        taken_epoch, taken_cursor = state["at"]
        passed = (epoch - taken_epoch) * self._num_examples + cursor - taken_cursor
        position = int(state["position"]) + passed
        if position < 0:
            raise HessianFlowError(
                f"epoch {epoch}, cursor {cursor} lies before the lap that is being read: a stream"
                " cannot go back so far; load an earlier state"
            )
        return int(state["lap"]), position

    def _seek(self, lap: int, position: int, source: Any, mark: Any) -> None:
        """Read next from a place, without reading anything again if that is possible."""
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
        """Return how many of the first `position` examples of a lap this rank reads."""
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
