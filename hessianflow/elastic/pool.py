"""The worker processes of an elastic run: Ray actors that are requested, awaited and admitted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hessianflow.distributed.ray_session import endings
from hessianflow.elastic.member import ElasticJob, Member
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError
from hessianflow.interfaces.errors import first_line

MAX_LOST_NEWCOMERS = 5
"""Workers that may, by our choice, end or be refused while the first ones start."""


@dataclass
class Newcomer:
    """A worker that is starting; `ready` gives the hash of its program once its job is built."""

    actor: Any
    ready: Any
    requested_at: float
    overdue: bool = False
    program: str = ""


class WorkerPool:
    """Members, in the order of ranks, and newcomers that are still starting.

    Args:
        ray: Module of Ray, which is connected.
        build: Function that makes the job, in each worker's process.
        settings: Settings of the run.

    Attributes:
        members, pending: Actors of the members, and newcomers.
    """

    def __init__(
        self, ray: Any, build: Callable[[], ElasticJob], settings: ElasticSettings
    ) -> None:
        self._ray = ray
        self._settings = settings
        remote = ray.remote(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)(Member)
        # Ray shows a worker only its own devices, so each has the first.
        device = "cuda:0" if settings.num_gpus > 0 else "cpu"
        self._new_member: Callable[[], Any] = lambda: remote.remote(build, device)
        self._program = ""
        self._refused: list[str] = []
        self.members: list[Any] = []
        self.pending: list[Newcomer] = []

    def request(self, count: int) -> None:
        """Request `count` new workers, without waiting for them.

        Raises:
            HessianFlowError: A local cluster can never have room for the smallest world.
        """
        settings = self._settings
        bundle = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
        if settings.address is None:
            for name, each in bundle.items():
                room = self._ray.cluster_resources().get(name, 0.0)
                if settings.min_workers * each > room:
                    raise HessianFlowError(
                        f"{settings.min_workers} workers of {each:g} {name}s need more than the"
                        f" {room:g} {name}s of this machine: lower --min-workers, or give the"
                        " address of a cluster"
                    )
        for _ in range(count):
            actor = self._new_member()
            self.pending.append(Newcomer(actor, actor.program.remote(), time.monotonic()))
        needed = {name: amount for name, amount in bundle.items() if amount > 0}
        self._request_room([needed] * (len(self.members) + len(self.pending)))

    def cancel(self, count: int) -> None:
        """Give up the last `count` newcomers that were requested."""
        for _ in range(count):
            self._ray.kill(self.pending.pop().actor)

    def await_all(self, seconds: float) -> list[str]:
        """Wait for all newcomers and admit them; request again those that end while they start.

        Returns:
            The reason why each of these ended.

        Raises:
            HessianFlowError: They did not arrive in time, or more than a few of them ended.
        """
        deadline = time.monotonic() + seconds
        lost: list[str] = []
        while self.pending:
            refs = [newcomer.ready for newcomer in self.pending]
            left = max(0.0, deadline - time.monotonic())
            ready, late = self._ray.wait(refs, num_returns=len(refs), timeout=left)
            if late:
                raise HessianFlowError(
                    f"{len(ready)} of {len(refs)} workers came within {seconds:g} s; the cluster"
                    f" has {self._ray.available_resources()} free: lower --min-workers, or wait for"
                    " nodes"
                )
            self.admit()
            failed = self.drop_failed()
            lost += failed
            if len(lost) > MAX_LOST_NEWCOMERS:
                raise HessianFlowError(
                    f"{len(lost)} new workers in a row were of no use, the last {lost[-1]}; look at"
                    " the workers' logs"
                )
            self.request(len(failed))
        return lost

    def arrived(self) -> bool:
        """Return whether a newcomer is ready."""
        refs = [newcomer.ready for newcomer in self.pending]
        return bool(refs) and bool(self._ray.wait(refs, timeout=0)[0])

    def newly_overdue(self) -> int:
        """Return how many newcomers became late since the last call; they are still admitted."""
        latest = time.monotonic() - self._settings.start_seconds
        late = [n for n in self.pending if not n.overdue and n.requested_at < latest]
        for newcomer in late:
            newcomer.overdue = True
        return len(late)

    def drop_failed(self) -> list[str]:
        """Drop newcomers that ended while they started or run other code; return the reasons."""
        self._sort_out()
        refused = self._refused.copy()
        self._refused.clear()
        return refused

    def admit(self) -> int:
        """Make the newcomers that are ready members, and return their number.

        Raises:
            HessianFlowError: The first workers run different programs.
            Exception: The `build` of one of the first workers raised it.
        """
        self._sort_out()
        ready = [newcomer for newcomer in self.pending if newcomer.program]
        for newcomer in ready:
            if self._program not in ("", newcomer.program):
                raise HessianFlowError(
                    f"all workers must run the same code: one has {self._program}, another"
                    f" {newcomer.program}; install the same versions of hessianflow and torch"
                    " everywhere"
                )
            self._program = newcomer.program
            self.members.append(newcomer.actor)
            self.pending.remove(newcomer)
        return len(ready)

    def close(self) -> None:
        """End all workers and withdraw the request for room."""
        for actor in [*self.members, *(newcomer.actor for newcomer in self.pending)]:
            self._ray.kill(actor)
        self._request_room([])

    def _request_room(self, bundles: list[dict[str, float]]) -> None:
        """Tell the autoscaler of a cluster, which a local one does not have, what is needed."""
        if self._settings.address is not None:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=bundles)

    def _sort_out(self) -> None:
        """Read the program of the newcomers that are ready, and drop those that cannot be used."""
        for newcomer in list(self.pending):
            if newcomer.program or not self._ray.wait([newcomer.ready], timeout=0)[0]:
                continue
            try:
                newcomer.program = self._ray.get(newcomer.ready)
            except endings(self._ray) as error:
                self._refuse(newcomer, f"died while it started: {first_line(error)}")
            except self._ray.exceptions.RayTaskError as error:
                if not self._program:  # no worker has built the job yet, so the job is at fault
                    raise own_error(error) from None
                self._refuse(newcomer, f"could not build its job: {first_line(error.cause)}")
            if newcomer.program and self._program not in ("", newcomer.program):
                own = f"runs other code ({newcomer.program})"
                self._refuse(newcomer, f"{own} than the others ({self._program})")

    def _refuse(self, newcomer: Newcomer, reason: str) -> None:
        self._refused.append(reason)
        self.pending.remove(newcomer)
        self._ray.kill(newcomer.actor)


def own_error(error: Any) -> Exception:
    """Return the error of a member's job: itself if it is a HessianFlowError, else Ray's."""
    return error.cause if isinstance(error.cause, HessianFlowError) else error
