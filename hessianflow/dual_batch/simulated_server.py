"""A parameter server and its workers in one process, on a virtual clock.

It is a discrete-event simulation: the worker that finishes first, by the time model, pushes first
(with ties, the lower number). Training is real, time is not, so accuracy and the order of commits
are those of a cluster with these times, and the same in every run. A snapshot holds the whole
simulation, so that an interrupted one continues as if it had not been interrupted.
"""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from hessianflow.dual_batch.server import ParameterServer, Weights
from hessianflow.interfaces import HessianFlowError, Stateful

LocalEpoch = Callable[[Weights, int], Weights]
"""Function that is called as local_epoch(weights, epoch), trains from the pulled weights, and
returns new ones.

The learning-rate schedule uses `epoch`, which is (commits + running local epochs) // workers: the
epoch of the coming push if all workers are equally fast. (The papers take commits // workers, by
which all but one of several workers that finish almost together train a second time in epoch 0.)

The commit holds the figures of an object that :class:`TellsFigures`; snapshots of a simulation hold
the state of one that is stateful."""


@runtime_checkable
class TellsFigures(Protocol):
    """A worker with named numbers about its last local epoch."""

    figures: Mapping[str, float]


def figures_of(local_epoch: LocalEpoch) -> dict[str, float]:
    """Return what a worker tells of its last local epoch; nothing where it tells nothing."""
    return dict(local_epoch.figures) if isinstance(local_epoch, TellsFigures) else {}


@dataclass(frozen=True)
class Commit:
    """A push on the timeline. Times are in seconds.

    Attributes:
        worker: Number of the worker.
        started, finished: Times of its pull and of its push.
        released: Time at which it could continue; later than `finished` if it had to wait, nan
            while it waits.
        staleness: Commits of other workers in between.
        epoch: Epoch of its learning rate.
        figures: Figures of the worker's local epoch.
    """

    worker: int
    started: float
    finished: float
    released: float
    staleness: int
    epoch: int
    figures: Mapping[str, float] = field(default_factory=dict)


def release(timeline: list[Commit], worker: int, now: float) -> None:
    """Note that a worker continues at `now`, if its last push is on the timeline."""
    for index in range(len(timeline) - 1, -1, -1):
        if timeline[index].worker == worker:
            timeline[index] = replace(timeline[index], released=now)
            return


def simulate(
    server: ParameterServer,
    workers: Mapping[int, LocalEpoch],
    seconds: Callable[[int, int], float],
    *,
    commits: int,
    on_commit: Callable[[Commit], None] | None = None,
    snapshot_commits: int | None = None,
    on_snapshot: Callable[[Mapping[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume_from: Mapping[str, Any] | None = None,
) -> list[Commit]:
    """Run workers against a server until it has received `commits` pushes.

    Args:
        server: Server with exactly these workers, which is changed.
        workers: Local training of each worker, by its number.
        seconds: Function that is called as seconds(worker, epoch) and returns the time of a local
            epoch, including push and pull.
        commits: Number of all pushes to the server; the papers use epochs times workers.
        on_commit: Function called after each push; its time does not count.
        snapshot_commits: Commits between two calls of `on_snapshot`; None for one when stopped.
        on_snapshot: Function called with the whole state: numbers, lists, dicts and arrays.
        should_stop: Function called after each push, which returns whether to take a last snapshot
            and stop.
        resume_from: Snapshot to continue from.

    Returns:
        The timeline of this call, in the order of pushes.

    Raises:
        HessianFlowError: The workers are not those of the server, or a time is not positive.
    """
    simulation = _Simulation(server, workers, seconds)
    if resume_from is not None:
        simulation.load_state_dict(resume_from)
    if set(workers) != set(server.workers):
        raise HessianFlowError(
            f"workers must be those of the server, {list(server.workers)}, got {sorted(workers)}"
        )
    if resume_from is None:
        for worker in server.workers:
            simulation.start(worker, 0.0)
    while server.commits < commits:
        commit = simulation.advance()
        if on_commit is not None:
            on_commit(commit)
        stop = should_stop is not None and should_stop()
        due = snapshot_commits is not None and server.commits % snapshot_commits == 0
        if on_snapshot is not None and (due or stop):
            on_snapshot(simulation.state_dict())
        if stop:
            break
    return simulation.timeline


class _Simulation:
    def __init__(
        self,
        server: ParameterServer,
        workers: Mapping[int, LocalEpoch],
        seconds: Callable[[int, int], float],
    ) -> None:
        self._server = server
        self._workers = workers
        self._seconds = seconds
        self._events: list[tuple[float, int]] = []
        self._running: dict[int, tuple[float, int, Weights]] = {}
        self.timeline: list[Commit] = []

    def start(self, worker: int, now: float) -> None:
        """Pull for a worker, and schedule its push."""
        epoch = (self._server.commits + len(self._running)) // len(self._workers)
        duration = self._seconds(worker, epoch)
        if not duration > 0:
            raise HessianFlowError(
                f"a local epoch must take a positive time, got {duration} s for worker {worker}"
            )
        self._running[worker] = now, epoch, self._server.pull(worker)
        heapq.heappush(self._events, (now + duration, worker))

    def advance(self) -> Commit:
        """Train up to the next push, and return it."""
        now, worker = heapq.heappop(self._events)
        started, epoch, weights = self._running.pop(worker)
        local_epoch = self._workers[worker]
        receipt = self._server.push(worker, local_epoch(weights, epoch))
        told = (receipt.staleness, epoch, figures_of(local_epoch))
        self.timeline.append(Commit(worker, started, now, math.nan, *told))
        for released in receipt.released:
            release(self.timeline, released, now)
            self.start(released, now)
        return self.timeline[-1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "server": self._server.state_dict(),
            "events": list(self._events),
            "running": dict(self._running),
            "workers": {n: worker.state_dict() for n, worker in self._stateful().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._server.load_state_dict(state["server"])
        self._events = [(time, worker) for time, worker in state["events"]]
        self._running = {number: tuple(saved) for number, saved in state["running"].items()}
        stateful = self._stateful()
        for number, saved in state["workers"].items():
            stateful[number].load_state_dict(saved)

    def _stateful(self) -> dict[int, Stateful]:
        workers: Mapping[int, object] = self._workers
        return {n: worker for n, worker in workers.items() if isinstance(worker, Stateful)}
