"""A parameter server and its workers in one process, on a virtual clock.

A discrete-event simulation: the worker that finishes first, by the time model, pushes first (ties: the lower number).
Training is real, time is not, so accuracy and the order of commits are those of a cluster with these times, and the
same from run to run.
"""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hessianflow.distributed.parameter_server import ParameterServer, Weights
from hessianflow.interfaces import HessianFlowError

LocalEpoch = Callable[[Weights, int], Weights]
"""local_epoch(weights, epoch) -> weights: train from the pulled weights; `epoch` for the learning-rate schedule."""


@dataclass(frozen=True)
class Commit:
    """One push on the timeline.

    Attributes:
        worker: who.
        started: seconds when it pulled.
        finished: seconds when it pushed.
        released: seconds when it could go on; later than `finished` where it had to wait, nan while it waits.
        staleness: commits of others in between.
        epoch: the learning-rate epoch it trained at.
    """

    worker: int
    started: float
    finished: float
    released: float
    staleness: int
    epoch: int


def simulate(
    server: ParameterServer,
    workers: Mapping[int, LocalEpoch],
    seconds: Callable[[int, int], float],
    *,
    commits: int,
    on_commit: Callable[[Commit], None] | None = None,
) -> list[Commit]:
    """Run workers against a server until it has had so many commits.

    Args:
        server: with exactly these workers; it is changed.
        workers: the local training of each, by number.
        seconds: seconds(worker, epoch): how long a local epoch takes, push and pull included.
        commits: pushes in all; the papers use epochs times workers.
        on_commit: called after each push, for evaluation at the server's weights; the clock does not see it.

    Returns:
        The timeline, in the order of pushes.

    Raises:
        HessianFlowError: workers that are not those of the server, or a time that is not positive.
    """
    if set(workers) != set(server.workers):
        raise HessianFlowError(f"workers must be those of the server, {list(server.workers)}, got {sorted(workers)}")
    simulation = _Simulation(server, workers, seconds)
    for worker in server.workers:
        simulation.start(worker, 0.0)
    while len(simulation.timeline) < commits:
        commit = simulation.advance()
        if on_commit is not None:
            on_commit(commit)
    return simulation.timeline


class _Simulation:
    def __init__(
        self, server: ParameterServer, workers: Mapping[int, LocalEpoch], seconds: Callable[[int, int], float]
    ) -> None:
        self._server, self._workers, self._seconds = server, workers, seconds
        self._events: list[tuple[float, int]] = []
        self._running: dict[int, tuple[float, int, Weights]] = {}
        self._last: dict[int, int] = {}
        self.timeline: list[Commit] = []

    def start(self, worker: int, now: float) -> None:
        """Pull, and finish later."""
        epoch = self._server.commits // len(self._workers)
        duration = self._seconds(worker, epoch)
        if not duration > 0:
            raise HessianFlowError(f"a local epoch must take a positive time, got {duration} s for worker {worker}")
        self._running[worker] = now, epoch, self._server.pull(worker)
        heapq.heappush(self._events, (now + duration, worker))

    def advance(self) -> Commit:
        """The next push."""
        now, worker = heapq.heappop(self._events)
        started, epoch, weights = self._running.pop(worker)
        receipt = self._server.push(worker, self._workers[worker](weights, epoch))
        self._last[worker] = len(self.timeline)
        self.timeline.append(Commit(worker, started, now, math.nan, receipt.staleness, epoch))
        for released in receipt.released:
            index = self._last[released]
            self.timeline[index] = replace(self.timeline[index], released=now)
            self.start(released, now)
        return self.timeline[self._last[worker]]
