"""One worker of an elastic run: a job in a process of its own that enters and leaves generations of the group."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.distributed.process_group import Generation, ProcessGroupReducer, abort, enter, leave
from hessianflow.distributed.reducers import GroupReducer
from hessianflow.distributed.state import ByteArray, broadcast_state, pack, unpack


@dataclass(frozen=True)
class JobReport:
    """How far a job has come, the same on every rank.

    Attributes:
        updates: optimizer steps in all.
        examples: trained in all, over all ranks.
        batch_size: of the next update, over all ranks.
        microbatch_size: the largest that fits one worker.
        done: nothing is left to train.
    """

    updates: int
    examples: int
    batch_size: int
    microbatch_size: int
    done: bool


class ElasticJob(Protocol):
    """Training that can change its world at the boundary between two updates.

    What `state` gives must belong to the last complete update, also after `run_until` was interrupted by an error in
    the middle of one: examples of an update that was not completed are trained again, and counted once.
    """

    def join(self, reducer: GroupReducer) -> None:
        """Go on as this rank of this world: take its shard of the data, sum over its group."""
        ...

    def run_until(self, updates: int) -> JobReport:
        """Train until so many updates have been made in all, or to the end."""
        ...

    def report(self) -> JobReport:
        """Without training."""
        ...

    def state(self) -> Any:
        """Everything another process needs to go on: nested plain values and tensors."""
        ...

    def load_state(self, state: Any) -> None:
        """Go on from `state`, at any world size."""
        ...

    @property
    def waited_seconds(self) -> float:
        """Time spent waiting for other ranks so far (:class:`GradientSynchronizer` counts it)."""
        ...


class Member:
    """The process of one worker; every method is called from outside, one at a time."""

    def __init__(self, build: Callable[[], ElasticJob], device: str) -> None:
        self._job = build()
        self._device = torch.device(device)

    def process_id(self) -> int:
        """The answer says that the job is built."""
        return os.getpid()

    def enter(
        self, generation: Generation, address: str, port: int, share_state: bool, timeout_seconds: float
    ) -> JobReport:
        """Become a rank of a generation; with `share_state`, go on from rank 0's state."""
        store = TCPStore(address, port, is_master=False)
        reducer = enter(generation, store, self._device, timeout_seconds=timeout_seconds)
        if share_state:
            self._share_state(reducer)
        self._job.join(reducer)
        return self._job.report()

    def run_until(self, updates: int) -> tuple[JobReport, float]:
        """The report, and the seconds spent computing rather than waiting for other ranks."""
        began, waited = time.perf_counter(), self._job.waited_seconds
        report = self._job.run_until(updates)
        return report, time.perf_counter() - began - (self._job.waited_seconds - waited)

    def leave(self) -> None:
        """Together with all other ranks of the generation."""
        leave()

    def abort(self) -> int:
        """Leave a generation in which some rank has failed; returns the updates completed."""
        abort()
        return self._job.report().updates

    def snapshot(self) -> tuple[int, tuple[Any, ByteArray]]:
        """Updates completed, to be read without the rest; and the state as a skeleton and one flat array."""
        return self._job.report().updates, pack(self._job.state())

    def restore(self, snapshot: tuple[Any, ByteArray]) -> None:
        """Go on from a snapshot."""
        self._job.load_state(unpack(*snapshot))

    def _share_state(self, reducer: ProcessGroupReducer) -> None:
        state = broadcast_state(reducer, self._job.state() if reducer.rank == 0 else None)
        if reducer.rank > 0:
            self._job.load_state(state)
