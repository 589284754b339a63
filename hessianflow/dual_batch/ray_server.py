"""The parameter server and its workers as Ray actors; this process only passes references between
them.

Weights go as one flat array from worker to server and back through Ray's object store. A worker
that dies or hangs is no longer waited for and is started again from the server's weights; nothing
that others have pushed is lost. A server that dies is started again from its last snapshot, with
the commits since then to be made once more.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hessianflow.distributed.ray_session import answer, connect, endings, told_in_one_line
from hessianflow.dual_batch.server import ParameterServer, Receipt, Weights
from hessianflow.dual_batch.simulated_server import Commit, LocalEpoch, figures_of
from hessianflow.interfaces import HessianFlowError

START_SECONDS = 120.0
"""Allowed to a new worker process before its first local epoch counts as late. Ours."""


@dataclass(frozen=True)
class ServerRun:
    """What a run on a parameter server gave.

    Attributes:
        weights: the server's at the end.
        timeline: the pushes, in the order in which they were taken in; `released` as in a
            simulation.
        events: what happened beside training, one line each.
    """

    weights: Weights
    timeline: list[Commit]
    events: list[str]


@dataclass(frozen=True)
class Resources:
    """What each worker asks Ray for."""

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
) -> ServerRun:
    """Run workers against a server, each in a process of its own, until it has had so many commits.

    Args:
        make_server: builds the server with all its workers; called in the server's process.
        make_worker: make_worker(number) builds one worker's local training; called in the worker's
            process.
        commits: pushes in all; the papers use epochs times workers.
        snapshot_commits: the server's state is kept aside after every so many commits. Default
            ours.
        timeout_seconds: a local epoch that takes longer counts as hung.
        max_restarts: restarts of workers and of the server, together, before the run gives up.
            Default ours.
        resources: of each worker.
        address: of a Ray cluster; None: a local one.
        on_snapshot: given each snapshot, to be written to disk.
        resume_from: a snapshot to start from.
        on_commit: called after each push.
        on_event: given every event as it happens, and the commits that count from there on (fewer
            where a server died).
        should_stop: asked after each push; a last snapshot is taken.

    Raises:
        HessianFlowError: no Ray, Ray itself failed, or too many restarts; or it is what the server
            or a worker raised.
    """
    ray = connect(address)
    run = _Run(
        ray,
        make_server,
        make_worker,
        resources or Resources(),
        timeout_seconds,
        max_restarts,
        resume_from,
    )
    run.on_event = on_event
    weights = None
    try:
        with told_in_one_line(ray):
            run.start()
            while weights is None:
                stopped = False
                while run.commits < commits and not stopped:
                    commit = run.advance()
                    if commit is None:
                        continue
                    if on_commit is not None:
                        on_commit(commit)
                    stopped = should_stop is not None and should_stop()
                    if stopped or run.commits % snapshot_commits == 0:
                        run.take_snapshot(on_snapshot)
                weights = run.weights()
        return ServerRun(weights, run.timeline, run.events)
    finally:
        run.close()


class ServerActor:
    """A parameter server in a process of its own."""

    def __init__(
        self, make_server: Callable[[], ParameterServer], state: Mapping[str, Any] | None
    ) -> None:
        self._make = make_server
        self._state = state

    def members(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Build the server, before anything else is asked; returns commits so far, all workers, and
        those that wait."""
        # not sooner: an error while an actor is made reaches nobody as itself
        self._server = self._make()
        if self._state is not None:
            self._server.load_state_dict(self._state)
            self._state = None
        return self._server.commits, self._server.workers, self._server.waiting

    def pull(self, worker: int) -> Weights:
        """See :class:`ParameterServer`."""
        return self._server.pull(worker)

    def push(self, worker: int, weights: Weights) -> Receipt:
        """See :class:`ParameterServer`."""
        return self._server.push(worker, weights)

    def replace(self, worker: int) -> tuple[int, ...]:
        """Take a worker out and in again with the factor it had; returns those this releases from a
        round."""
        factor = self._server.factors[worker]
        released = self._server.remove(worker)
        self._server.add(worker, factor)
        return released

    def weights(self) -> Weights:
        """As they are now."""
        return self._server.weights

    def state(self) -> dict[str, Any]:
        """For a snapshot."""
        return self._server.state_dict()


class WorkerActor:
    """One worker's local training in a process of its own."""

    def __init__(self, make_worker: Callable[[int], LocalEpoch], number: int) -> None:
        self._make = partial(make_worker, number)
        self._local_epoch: LocalEpoch | None = None

    def ready(self) -> bool:
        """Build the worker; answers once that is done."""
        self._built()
        return True

    def train(self, weights: Weights, epoch: int) -> tuple[dict[str, float], Weights]:
        """One local epoch; its figures let the caller see success without fetching the weights."""
        local_epoch = self._built()
        made = local_epoch(weights.copy(), epoch)  # arrays from the object store are read-only
        return figures_of(local_epoch), made

    def _built(self) -> LocalEpoch:
        self._local_epoch = self._local_epoch or self._make()
        return self._local_epoch


@dataclass(frozen=True)
class _Training:
    worker: int
    started: float
    deadline: float
    epoch: int
    weights: Any


class _Run:
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
        self._ray, self._timeout, self._restarts_left = ray, timeout_seconds, max_restarts
        self._endings = endings(ray)
        self._answer = partial(answer, ray)
        self._new_server = partial(ray.remote(num_cpus=0)(ServerActor).remote, make_server)
        remote = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        self._new_worker = partial(remote(WorkerActor).remote, make_worker)
        self._snapshot = None if snapshot is None else ray.put(snapshot)
        self._began = time.monotonic()
        self._workers: dict[int, Any] = {}
        self._last: dict[int, int] = {}
        self._running: dict[Any, _Training] = {}
        self.server: Any = None
        self.events: list[str] = []
        self.on_event: Callable[[str, int], None] | None = None
        self.timeline: list[Commit] = []
        self.commits = 0

    def start(self) -> None:
        """Start the server and all workers."""
        self._start_server()
        self._resumed_at = self.commits

    def advance(self) -> Commit | None:
        """Wait for the next worker to finish and push what it has; None when something failed
        instead."""
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
        try:
            receipt: Receipt = self._answer(
                self.server.push.remote(training.worker, training.weights)
            )
        except self._endings:
            self._restore_server()
            return None
        return self._account(training, receipt, figures)

    def weights(self) -> Weights | None:
        """The server's; None where it died, and was started again from its last snapshot."""
        try:
            found: Weights = self._answer(self.server.weights.remote())
        except self._endings:
            self._restore_server()
            return None
        return found

    def take_snapshot(self, on_snapshot: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Keep the server's state where it outlives the server."""
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
        """End all actors."""
        for actor in [self.server, *self._workers.values()]:
            if actor is not None:
                self._ray.kill(actor)

    def _account(
        self, training: _Training, receipt: Receipt, figures: Mapping[str, float]
    ) -> Commit:
        now = self._now()
        self.commits += 1
        self._last[training.worker] = len(self.timeline)
        self.timeline.append(
            Commit(
                training.worker,
                training.started,
                now,
                math.nan,
                receipt.staleness,
                training.epoch,
                figures,
            )
        )
        self._release(receipt.released, now)
        return self.timeline[self._last[training.worker]]

    def _release(self, workers: Iterable[int], now: float) -> None:
        for worker in workers:
            if worker in self._last:
                index = self._last[worker]
                self.timeline[index] = replace(self.timeline[index], released=now)
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
        self._last = {commit.worker: index for index, commit in enumerate(self.timeline)}

    def _start_server(self) -> None:
        """Start the server, from the last snapshot if there is one, and all workers that need not
        wait."""
        self._running.clear()  # what was under way is dropped
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
        """Let all build what they need before the clock starts; one that fails is noticed at its
        first local epoch."""
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
