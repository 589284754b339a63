"""The two ways to run workers against a server, behind one signature: simulated in this process, or
on Ray."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch.ray_server import Resources, train_on_ray
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.simulated_server import Commit, LocalEpoch, simulate

Snapshot = Mapping[str, Any]


@dataclass(frozen=True)
class Listener:
    """Who is told what happens.

    Attributes:
        on_commit: of every push; its times go on from those before an interruption.
        on_snapshot: of the state after every epoch, and when stopped; `state["server"]["weights"]`
            are the server's.
        on_event: of failures, and how many commits still count.
        should_stop: asked after every push.
    """

    on_commit: Callable[[Commit], None]
    on_snapshot: Callable[[Snapshot], None]
    on_event: Callable[[str, int], None]
    should_stop: Callable[[], bool]


class Transport(Protocol):
    """Trains until the server has had `commits` pushes, from the beginning or from a snapshot."""

    def __call__(self, commits: int, listener: Listener, resume_from: Snapshot | None) -> None:
        """Train, telling the listener."""
        ...


@dataclass(frozen=True)
class Simulated:
    """All workers in this process; the clock is that of the time model.

    Attributes:
        make_server: builds the server.
        make_worker: builds each worker's local training.
        seconds: seconds(worker, epoch).
    """

    make_server: Callable[[], ParameterServer]
    make_worker: Callable[[int], LocalEpoch]
    seconds: Callable[[int, int], float]

    def __call__(self, commits: int, listener: Listener, resume_from: Snapshot | None) -> None:
        """See :class:`Transport`."""
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
    """Server and workers in processes of their own; the clock is the wall's. Workers start with no
    momentum.

    Attributes:
        make_server: builds the server, in its process.
        make_worker: builds one worker's local training, in its process.
        workers: how many there are.
        resources: of each.
        address: of the cluster; None: a local one.
    """

    make_server: Callable[[], ParameterServer]
    make_worker: Callable[[int], LocalEpoch]
    workers: int
    resources: Resources
    address: str | None = None

    def __call__(self, commits: int, listener: Listener, resume_from: Snapshot | None) -> None:
        """See :class:`Transport`."""
        with _own_signal_handlers():
            connect(self.address)
        before = clock = 0.0 if resume_from is None else float(resume_from["clock"])

        def shifted(commit: Commit) -> None:
            nonlocal clock
            times = {
                name: getattr(commit, name) + before for name in ("started", "finished", "released")
            }
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
            resume_from=None if resume_from is None else resume_from["server"],
        )


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray sets handlers of its own when it starts; the caller's come back afterwards."""
    numbers = (
        (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    found = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
