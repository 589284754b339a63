"""Two ways to run workers against a server, with one signature: simulated here, or on Ray."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch.ray_server import Resources, train_on_ray
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.simulated_server import Commit, LocalEpoch, simulate

Snapshot = Mapping[str, Any]


@dataclass(frozen=True)
class Listener:
    """Functions that a transport calls.

    Attributes:
        on_commit: Called after every push, with times that continue those before an interruption.
        on_snapshot: Called with the state after every epoch, and when stopped; the server's weights
            are `state["server"]["weights"]`.
        on_event: Called after a failure, with a text and the number of commits that still count.
        should_stop: Called after every push; returns whether to stop.
    """

    on_commit: Callable[[Commit], None]
    on_snapshot: Callable[[Snapshot], None]
    on_event: Callable[[str, int], None]
    should_stop: Callable[[], bool]


Transport = Callable[[int, Listener, Snapshot | None], None]
"""Function that is called as transport(commits, listener, resume_from), and trains until the server
has received `commits` pushes, from the beginning or from a snapshot."""


@dataclass(frozen=True)
class Simulated:
    """The transport with all workers in this process, whose clock is that of the time model.

    Attributes:
        make_server: Function that builds the server.
        make_worker: Function that builds a worker's local training by its number.
        seconds: Function that is called as seconds(worker, epoch) and returns the time of a local
            epoch.
    """

    make_server: Callable[[], ParameterServer]
    make_worker: Callable[[int], LocalEpoch]
    seconds: Callable[[int, int], float]

    def __call__(self, commits: int, listener: Listener, resume_from: Snapshot | None) -> None:
        """Simulate `commits` pushes, from the beginning or from a snapshot."""
        server = self.make_server()
        simulate(
            server,
            {number: self.make_worker(number) for number in server.workers},
            self.seconds,
            commits=commits,
            on_commit=listener.on_commit,
            snapshot_commits=len(server.workers),
            on_snapshot=listener.on_snapshot,
            should_stop=listener.should_stop,
            resume_from=resume_from,
        )


@dataclass(frozen=True)
class OnRay:
    """The transport with server and workers in processes of Ray, measured in wall time.

    After a resumption, workers begin without momentum. The attributes are arguments of
    :func:`~hessianflow.dual_batch.ray_server.train_on_ray`, and the number of workers.
    """

    make_server: Callable[[], ParameterServer]
    make_worker: Callable[[int], LocalEpoch]
    workers: int
    resources: Resources
    address: str | None = None

    def __call__(self, commits: int, listener: Listener, resume_from: Snapshot | None) -> None:
        """Train for `commits` pushes, from the beginning or from a snapshot."""
        with _own_signal_handlers():
            connect(self.address)
        earlier = resume_from or {"server": None, "clock": 0.0}
        before = float(earlier["clock"])
        clock = before

        def shifted(commit: Commit) -> None:
            nonlocal clock
            names = ("started", "finished", "released")
            times = {name: getattr(commit, name) + before for name in names}
            clock = times["finished"]
            listener.on_commit(replace(commit, **times))

        def snapshot(state: Mapping[str, Any]) -> None:
            listener.on_snapshot({"server": state, "clock": clock})

        train_on_ray(
            self.make_server,
            self.make_worker,
            commits=commits,
            snapshot_commits=self.workers,
            resources=self.resources,
            address=self.address,
            on_commit=shifted,
            on_snapshot=snapshot,
            on_event=listener.on_event,
            should_stop=listener.should_stop,
            resume_from=earlier["server"],
        )


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the caller's signal handlers at the end, since Ray sets its own when it starts."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        handlers.clear()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
