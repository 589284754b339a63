"""A parameter server and its workers in one process, on a virtual clock.

A discrete-event simulation: the worker that finishes first, by the time model, pushes first (ties:
the lower number). Training is real, time is not, so accuracy and the order of commits are those of
a cluster with these times, and the same from run to run. A snapshot holds all of it, so that an
interrupted simulation goes on as if it had not been.
"""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from hessianflow.dual_batch.server import ParameterServer, Weights
from hessianflow.interfaces import HessianFlowError, Stateful

LocalEpoch = Callable[[Weights, int], Weights]
"""local_epoch(weights, epoch) -> weights: train from the pulled weights; `epoch` for the
learning-rate schedule.

`epoch` is (commits + local epochs under way) // workers: that of the push to come, if all keep
pace. (The papers take commits // workers, by which workers that finish almost together train all
but one a second time in epoch 0.)

One that :class:`TellsFigures` has them carried by its commit; the state of one that is stateful is
part of a simulation's snapshots."""


@runtime_checkable
class TellsFigures(Protocol):
    """A worker with named numbers about its last local epoch."""

    figures: Mapping[str, float]


def figures_of(local_epoch: LocalEpoch) -> dict[str, float]:
    """Return what a worker tells of its last local epoch; nothing where it tells nothing."""
    return dict(local_epoch.figures) if isinstance(local_epoch, TellsFigures) else {}


@dataclass(frozen=True)
class Commit:
    """One push on the timeline.

    Attributes:
        worker: who.
        started: seconds when it pulled.
        finished: seconds when it pushed.
        released: seconds when it could go on; later than `finished` where it had to wait, nan while
            it waits.
        staleness: commits of others in between.
        epoch: the learning-rate epoch it trained at.
        figures: what the worker tells of its local epoch.
    """

    worker: int
    started: float
    finished: float
    released: float
    staleness: int
    epoch: int
    figures: Mapping[str, float] = field(default_factory=dict)


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
    """Run workers against a server until it has had so many commits.

    Args:
        server: with exactly these workers; it is changed.
        workers: the local training of each, by number.
        seconds: seconds(worker, epoch): how long a local epoch takes, push and pull included.
        commits: pushes that the server is to have had in all; the papers use epochs times workers.
        on_commit: called after each push; the clock does not see it.
        snapshot_commits: `on_snapshot` is called after every so many commits. None: only when
            stopped.
        on_snapshot: given the state of everything: numbers, lists, dicts and arrays.
        should_stop: asked after each push.
        resume_from: a snapshot to go on from.

    Returns:
        The timeline, in the order of pushes, from where this call began.

    Raises:
        HessianFlowError: workers that are not those of the server, or a time that is not positive.
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
        self._server, self._workers, self._seconds = server, workers, seconds
        self._events: list[tuple[float, int]] = []
        self._running: dict[int, tuple[float, int, Weights]] = {}
        self._last: dict[int, int] = {}
        self.timeline: list[Commit] = []

    def start(self, worker: int, now: float) -> None:
        """Pull, and finish later."""
        epoch = (self._server.commits + len(self._running)) // len(self._workers)
        duration = self._seconds(worker, epoch)
        if not duration > 0:
            raise HessianFlowError(
                f"a local epoch must take a positive time, got {duration} s for worker {worker}"
            )
        self._running[worker] = now, epoch, self._server.pull(worker)
        heapq.heappush(self._events, (now + duration, worker))

    def advance(self) -> Commit:
        """The next push."""
        now, worker = heapq.heappop(self._events)
        started, epoch, weights = self._running.pop(worker)
        local_epoch = self._workers[worker]
        receipt = self._server.push(worker, local_epoch(weights, epoch))
        self._last[worker] = len(self.timeline)
        figures = figures_of(local_epoch)
        self.timeline.append(
            Commit(worker, started, now, math.nan, receipt.staleness, epoch, figures)
        )
        for released in receipt.released:
            if released in self._last:  # else it pushed before an interruption
                index = self._last[released]
                self.timeline[index] = replace(self.timeline[index], released=now)
            self.start(released, now)
        return self.timeline[self._last[worker]]

    def state_dict(self) -> dict[str, Any]:
        """Between two pushes."""
        return {
            "server": self._server.state_dict(),
            "events": list(self._events),
            "running": dict(self._running),
            "workers": {n: worker.state_dict() for n, worker in self._stateful().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._server.load_state_dict(state["server"])
        self._events = [(time, worker) for time, worker in state["events"]]
        self._running = {
            number: (began, epoch, w) for number, (began, epoch, w) in state["running"].items()
        }
        stateful = self._stateful()
        for number, saved in state["workers"].items():
            stateful[number].load_state_dict(saved)

    def _stateful(self) -> dict[int, Stateful]:
        workers: Mapping[int, object] = self._workers
        return {n: worker for n, worker in workers.items() if isinstance(worker, Stateful)}
