"""One worker of an elastic run: a job in a process of its own that enters and leaves generations of
the group."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.distributed.fingerprint import code_fingerprint
from hessianflow.distributed.process_group import (
    Generation,
    ProcessGroupReducer,
    abort,
    enter,
    leave,
)
from hessianflow.distributed.reducers import GroupReducer
from hessianflow.distributed.state import ByteArray, broadcast_state, pack, unpack
from hessianflow.distributed.store import LOCAL, gloo_on_this_machine

Row = Mapping[str, Any]
"""One record of a run."""


@dataclass(frozen=True)
class JobReport:
    """How far a job has come, the same on every rank.

    Attributes:
        updates: optimizer steps in all.
        examples: trained in all, over all ranks.
        batch_size: of the next update, over all ranks.
        microbatch_size: the largest that fits one worker.
        done: nothing is left to train.
        rows: records made so far.
        keep: this is a good moment for a snapshot, such as the end of an epoch.
    """

    updates: int
    examples: int
    batch_size: int
    microbatch_size: int
    done: bool
    rows: int = 0
    keep: bool = False


class ElasticJob(Protocol):
    """Training that can change its world at the boundary between two updates.

    What `state` gives must belong to the last complete update, also after `run_until` was
    interrupted by an error in the middle of one: examples of an update that was not completed are
    trained again, and counted once.
    """

    def join(self, reducer: GroupReducer) -> None:
        """Go on as this rank of this world: take its shard of the data, sum over its group."""
        ...

    def run_until(self, updates: int) -> JobReport:
        """Train until so many updates have been made in all, or to the end; may return earlier, at
        a `keep`."""
        ...

    def rows(self, start: int) -> Sequence[Row]:
        """Return the records made so far, the same on every rank, from number `start` on."""
        ...

    def describe(self) -> Row:
        """Whatever whoever started the run wants to know at its start and at its end."""
        ...

    def report(self) -> JobReport:
        """Without training."""
        ...

    def state(self) -> Any:
        """Return everything another process needs to go on: nested plain values and tensors."""
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
        self._build = build
        self._device = torch.device(device)

    def program(self) -> str:
        """Build the job, before anything else is asked; returns a hash of the code this process
        runs."""
        # not sooner: an error while an actor is made reaches nobody as itself
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
        """Become a rank of a generation; with `share_state`, go on from rank 0's state."""
        self._rank = generation.rank
        store = TCPStore(address, port, is_master=False)
        with gloo_on_this_machine() if address == LOCAL else nullcontext():
            reducer = enter(generation, store, self._device, timeout_seconds=timeout_seconds)
        if share_state:
            self._share_state(reducer)
        self._job.join(reducer)
        return self._job.report()

    def run_until(self, updates: int, start: int) -> tuple[JobReport, float, Sequence[Row]]:
        """Return the report, the seconds spent computing rather than waiting for others, and rank
        0's records from `start`."""
        began, waited = time.perf_counter(), self._job.waited_seconds
        report = self._job.run_until(updates)
        busy = time.perf_counter() - began - (self._job.waited_seconds - waited)
        return report, busy, self._job.rows(start) if self._rank == 0 else ()

    def describe(self) -> Row:
        """See :class:`ElasticJob`."""
        return self._job.describe()

    def leave(self) -> None:
        """Together with all other ranks of the generation."""
        leave()

    def abort(self) -> int:
        """Leave a generation in which some rank has failed; returns the updates completed."""
        abort()
        return self._job.report().updates

    def snapshot(self) -> tuple[int, tuple[Any, ByteArray]]:
        """Updates completed, to be read without the rest; and the state as a skeleton and one flat
        array."""
        return self._job.report().updates, pack(self._job.state())

    def restore(self, snapshot: tuple[Any, ByteArray]) -> None:
        """Go on from a snapshot."""
        self._job.load_state(unpack(*snapshot))

    def _share_state(self, reducer: ProcessGroupReducer) -> None:
        state = broadcast_state(reducer, self._job.state() if reducer.rank == 0 else None)
        if reducer.rank > 0:
            self._job.load_state(state)
