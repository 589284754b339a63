"""One worker of an elastic run: a job in its own process that joins and leaves generations."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.distributed.process_group import (
    Generation,
    ProcessGroupReducer,
    abort,
    enter,
    leave,
)
from hessianflow.distributed.state import ByteArray, broadcast_state, pack, unpack
from hessianflow.distributed.store import LOCAL, gloo_on_this_machine
from hessianflow.distributed.world import code_fingerprint
from hessianflow.interfaces.world import GroupReducer

Row = Mapping[str, Any]
"""A record of a run."""


@dataclass(frozen=True)
class JobReport:
    """The progress of a job, the same on every rank.

    Attributes:
        updates, examples: Numbers of all optimizer steps and of all examples, over all ranks.
        batch_size: Examples of the next update, over all ranks.
        microbatch_size: Largest microbatch that fits one worker.
        done: Whether nothing is left to train.
        rows: Number of records made so far.
        keep: Whether this is a good moment for a snapshot, such as the end of an epoch.
    """

    updates: int
    examples: int
    batch_size: int
    microbatch_size: int
    done: bool
    rows: int = 0
    keep: bool = False


class ElasticJob(Protocol):
    """Training that can change its world at the boundary between two updates."""

    def join(self, reducer: GroupReducer) -> None:
        """Continue as this rank of this world: take its shard of the data, sum over its group."""

    def run_until(self, updates: int) -> JobReport:
        """Train until `updates` updates have been made, or to the end, or to an earlier `keep`."""

    def rows(self, start: int) -> Sequence[Row]:
        """Return the records made so far, the same on every rank, from number `start` on."""

    def describe(self) -> Row:
        """Return a description of the job, which is read at the start and at the end of the run."""

    def report(self) -> JobReport:
        """Return the progress of the job, without training."""

    def state(self) -> Any:
        """Return all that another process needs to continue: nested plain values and tensors.

        It belongs to the last complete update, also after an error interrupted `run_until` in the
        middle of one: examples of an incomplete update are trained again, and counted once.
        """

    def load_state(self, state: Any) -> None:
        """Continue from `state`, at any world size."""

    @property
    def waited_seconds(self) -> float:
        """Return the time spent waiting for other ranks (:class:`GradientSynchronizer` counts)."""


class Member:
    """The process of one worker, whose methods the cluster calls, one at a time."""

    def __init__(self, build: Callable[[], ElasticJob], device: str) -> None:
        self._build = build
        self._device = torch.device(device)

    def program(self) -> str:
        """Build the job, before any other method is called, and return a hash of the code."""
        # In a constructor, Ray would hide the error of a build that fails.
        self._job = self._build()
        return code_fingerprint()

    def enter(
        self,
        generation: Generation,
        address: str,
        port: int,
        share_state: bool,
        timeout_seconds: float,
    ) -> JobReport:
        """Become a rank of a generation; with `share_state`, continue from rank 0's state."""
        self._rank = generation.rank
        store = TCPStore(address, port, is_master=False)
        with gloo_on_this_machine() if address == LOCAL else nullcontext():
            reducer = enter(generation, store, self._device, timeout_seconds=timeout_seconds)
        if share_state:
            self._share_state(reducer)
        self._job.join(reducer)
        return self._job.report()

    def run_until(self, updates: int, start: int) -> tuple[JobReport, float, Sequence[Row]]:
        """Train, and return the report, the seconds spent computing, and rank 0's new records.

        The seconds do not include waiting for other ranks; the records begin with number `start`.
        """
        began = time.perf_counter()
        waited = self._job.waited_seconds
        report = self._job.run_until(updates)
        busy = time.perf_counter() - began - (self._job.waited_seconds - waited)
        rows = self._job.rows(start) if self._rank == 0 else ()
        return report, busy, rows

    def describe(self) -> Row:
        """Return the job's description of itself."""
        return self._job.describe()

    def leave(self) -> None:
        """Leave the generation, together with all its other ranks."""
        leave()

    def abort(self) -> int:
        """Leave a generation in which a rank has failed, and return the completed updates."""
        abort()
        return self._job.report().updates

    def snapshot(self) -> tuple[int, tuple[Any, ByteArray]]:
        """Return the completed updates, and the state as a skeleton and one flat array.

        Ray stores the two apart, so that the first can be read without the second.
        """
        return self._job.report().updates, pack(self._job.state())

    def restore(self, snapshot: tuple[Any, ByteArray]) -> None:
        """Continue from a snapshot."""
        self._job.load_state(unpack(*snapshot))

    def _share_state(self, reducer: ProcessGroupReducer) -> None:
        if reducer.rank == 0:
            broadcast_state(reducer, self._job.state())
        else:
            self._job.load_state(broadcast_state(reducer, None))
