"""Train on a parameter server whose workers are Ray actors; this process only passes references.

Weights go as one flat array from worker to server and back through Ray's object store. A worker
that dies or hangs is started again from the server's weights, without waiting for it; no push of
another worker is lost. A server that dies is started again from its last snapshot.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from hessianflow.distributed.ray_session import answer, connect, endings, told_in_one_line
from hessianflow.dual_batch.actors import ServerActor, WorkerActor
from hessianflow.dual_batch.server import ParameterServer, Receipt, Weights
from hessianflow.dual_batch.simulated_server import Commit, LocalEpoch, release
from hessianflow.interfaces import HessianFlowError

START_SECONDS = 120.0
"""Time for a new worker process to start, besides that of its first local epoch: our choice."""


@dataclass(frozen=True)
class ServerSession:
    """The result of a session of training on a parameter server.

    Attributes:
        weights: Weights of the server at the end.
        timeline: Pushes in the order in which the server received them.
        events: Failures and restarts, one line each.
    """

    weights: Weights
    timeline: list[Commit]
    events: list[str]


@dataclass(frozen=True)
class Resources:
    """The resources that each worker requests from Ray."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0


def train_on_ray(
    make_server: Callable[[], ParameterServer],
    make_worker: Callable[[int], LocalEpoch],
    *,
    commits: int,
    snapshot_commits: int = 10,
    timeout_seconds: float = 600.0,
    max_restarts: int = 10,
    resources: Resources | None = None,
    address: str | None = None,
    on_snapshot: Callable[[Mapping[str, Any]], None] | None = None,
    resume_from: Mapping[str, Any] | None = None,
    on_commit: Callable[[Commit], None] | None = None,
    on_event: Callable[[str, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ServerSession:
    """Run workers against a server, each in its own process, until it has received the commits.

    For `commits`, `on_commit` and `should_stop` see
    :func:`~hessianflow.dual_batch.simulated_server.simulate`.

    Args:
        make_server: Function that builds the server with all its workers, in the server's process.
        make_worker: Function that builds a worker's local training by its number, in the worker's
            process.
        snapshot_commits: Number of commits between two snapshots. This default is our choice.
        timeout_seconds: Time after which a local epoch counts as hung.
        max_restarts: Restarts of workers and of the server, together, after which the run gives up.
            This default is our choice.
        resources: Resources of each worker.
        address: Address of a Ray cluster; None for a local one.
        on_snapshot: Function called with each snapshot of the server, to write it to disk.
        resume_from: Snapshot to start from.
        on_event: Function called with every event as it happens, and the number of commits that
            still count (fewer if the server died).

    Raises:
        HessianFlowError: Ray is not installed or failed, there were too many restarts, or the
            server or a worker raised it.
    """
    ray = connect(address)
    supervisor = _Supervisor(
        ray,
        make_server,
        make_worker,
        resources or Resources(),
        timeout_seconds,
        max_restarts,
        resume_from,
    )
    supervisor.on_event = on_event
    weights = None
    try:
        with told_in_one_line(ray):
            supervisor.start()
            while weights is None:
                stopped = False
                while supervisor.commits < commits and not stopped:
                    commit = supervisor.advance()
                    if commit is None:
                        continue
                    if on_commit is not None:
                        on_commit(commit)
                    stopped = should_stop is not None and should_stop()
                    if stopped or supervisor.commits % snapshot_commits == 0:
                        supervisor.take_snapshot(on_snapshot)
                weights = supervisor.weights()
        return ServerSession(weights, supervisor.timeline, supervisor.events)
    finally:
        supervisor.close()


@dataclass(frozen=True)
class _Training:
    worker: int
    started: float
    deadline: float
    epoch: int
    weights: Any


class _Supervisor:
    """Starts the actors, passes weights between them, and starts again those that fail."""

    def __init__(
        self,
        ray: Any,
        make_server: Callable[[], ParameterServer],
        make_worker: Callable[[int], LocalEpoch],
        resources: Resources,
        timeout_seconds: float,
        max_restarts: int,
        snapshot: Mapping[str, Any] | None,
    ) -> None:
        self._ray = ray
        self._timeout = timeout_seconds
        self._restarts_left = max_restarts
        self._endings = endings(ray)
        self._answer = partial(answer, ray)
        self._new_server = partial(ray.remote(num_cpus=0)(ServerActor).remote, make_server)
        remote = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        self._new_worker = partial(remote(WorkerActor).remote, make_worker)
        self._snapshot = None if snapshot is None else ray.put(snapshot)
        self._began = time.monotonic()
        self._workers: dict[int, Any] = {}
        self._running: dict[Any, _Training] = {}
        self.server: Any = None
        self.events: list[str] = []
        self.on_event: Callable[[str, int], None] | None = None
        self.timeline: list[Commit] = []
        self.commits = 0

    def start(self) -> None:
        self._start_server()
        self._resumed_at = self.commits

    def advance(self) -> Commit | None:
        """Wait for the next worker to finish, and push its weights; return None after a failure."""
        done, _ = self._ray.wait(list(self._running), timeout=self._first_deadline())
        if not done:
            self._replace(min(self._running.values(), key=lambda t: t.deadline).worker, "hung")
            return None
        training = self._running.pop(done[0])
        try:
            figures: dict[str, float] = self._answer(done[0])
        except self._endings:
            self._replace(training.worker, "died")
            return None
        pushed = self.server.push.remote(training.worker, training.weights)
        try:
            receipt: Receipt = self._answer(pushed)
        except self._endings:
            self._restore_server()
            return None
        return self._account(training, receipt, figures)

    def weights(self) -> Weights | None:
        """Return the server's weights; None if it died, and was started from its last snapshot."""
        try:
            weights: Weights = self._answer(self.server.weights.remote())
        except self._endings:
            self._restore_server()
            return None
        return weights

    def take_snapshot(self, on_snapshot: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Keep the server's state in the object store, where it outlives the server."""
        state = self.server.state.remote()
        try:
            value = self._answer(state)
        except self._endings:  # the last snapshot is still there
            self._restore_server()
            return
        self._snapshot = state
        if on_snapshot is not None:
            on_snapshot(value)

    def close(self) -> None:
        for actor in [self.server, *self._workers.values()]:
            if actor is not None:
                self._ray.kill(actor)

    def _account(
        self, training: _Training, receipt: Receipt, figures: Mapping[str, float]
    ) -> Commit:
        now = self._now()
        self.commits += 1
        told = (receipt.staleness, training.epoch, figures)
        self.timeline.append(Commit(training.worker, training.started, now, math.nan, *told))
        self._release(receipt.released, now)
        return self.timeline[-1]

    def _release(self, workers: Iterable[int], now: float) -> None:
        for worker in workers:
            release(self.timeline, worker, now)
            self._train(worker)

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _train(self, worker: int) -> None:
        now = self._now()
        deadline = now + self._timeout
        if worker not in self._workers:
            self._workers[worker] = self._new_worker(worker)
            deadline += START_SECONDS
        epoch = (self.commits + len(self._running)) // self._size
        actor = self._workers[worker]
        succeeded, weights = actor.train.options(num_returns=2).remote(
            self.server.pull.remote(worker), epoch
        )
        self._running[succeeded] = _Training(worker, now, deadline, epoch, weights)

    def _first_deadline(self) -> float:
        return max(0.0, min(training.deadline for training in self._running.values()) - self._now())

    def _replace(self, worker: int, what: str) -> None:
        self._count_restart(f"worker {worker} {what}")
        self._ray.kill(self._workers.pop(worker))
        self._running = {ref: t for ref, t in self._running.items() if t.worker != worker}
        try:
            released = self._answer(self.server.replace.remote(worker))
        except self._endings:
            self._restore_server()
            return
        self._release(released, self._now())
        if worker not in released:
            self._train(worker)

    def _restore_server(self) -> None:
        died_at = self.commits
        self._start_server()
        self._count_restart(f"server died after {died_at} commits; back to {self.commits}")
        del self.timeline[self.commits - self._resumed_at :]

    def _start_server(self) -> None:
        """Start the server, from the last snapshot if there is one, and the local epochs."""
        self._running.clear()  # local epochs of an earlier server are dropped
        self.server = self._new_server(self._snapshot)
        try:
            self.commits, workers, waiting = self._answer(self.server.members.remote())
        except self._endings:
            self._count_restart("server died while it started")
            self._start_server()
            return
        self._size = len(workers)
        if not self._workers:
            self._start_workers(workers)
        for worker in set(workers) - set(waiting):
            self._train(worker)

    def _start_workers(self, workers: Iterable[int]) -> None:
        """Start and build all workers, then the clock; a failure is noticed in the first epoch."""
        self._workers = {worker: self._new_worker(worker) for worker in workers}
        ready = [actor.ready.remote() for actor in self._workers.values()]
        self._ray.wait(ready, num_returns=len(ready), timeout=START_SECONDS)
        self._began = time.monotonic()

    def _count_restart(self, event: str) -> None:
        self.events.append(f"{self._now():.1f} s: {event}")
        if self.on_event is not None:
            self.on_event(self.events[-1], self.commits)
        self._restarts_left -= 1
        if self._restarts_left < 0:
            raise HessianFlowError(
                f"too many failures, the last: {event}; look at the workers' logs or raise"
                " max_restarts"
            )
