"""The worker processes of an elastic run, as Ray actors: asked for, awaited, grouped, and
buried."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hessianflow.distributed.process_group import Generation
from hessianflow.distributed.ray_session import endings, first_line
from hessianflow.distributed.state import pack, unpack
from hessianflow.distributed.store import LOCAL, serve
from hessianflow.elastic.member import ElasticJob, JobReport, Member, Row
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError

GRACE_SECONDS = 5.0
"""How long members that have not answered are waited for once another has failed. Ours."""

MAX_LOST_NEWCOMERS = 5
"""Workers that may end or be refused while the first ones start, before the run gives up. Ours."""


@dataclass
class _Pending:
    """A worker that has been asked for; `ready` is answered once its job is built, with a hash of
    its program."""

    actor: Any
    ready: Any
    asked_at: float
    overdue: bool = False
    program: str = ""


class Cluster:
    """The members of the current generation, in the order of ranks, and the newcomers that are
    still starting.

    Args:
        ray: the module, connected.
        build: makes the job, in each worker's process.
        settings: of the run.

    Attributes:
        members: actors of the current generation.
        pending: newcomers.
        last_error: what the last failure said.
    """

    def __init__(
        self, ray: Any, build: Callable[[], ElasticJob], settings: ElasticSettings
    ) -> None:
        self._ray, self._settings = ray, settings
        remote = ray.remote(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)(Member)
        # Ray shows a worker its own devices only
        device = "cuda:0" if settings.num_gpus > 0 else "cpu"
        self._new_member: Callable[[], Any] = lambda: remote.remote(build, device)
        # The store lives here, where no worker's death can take it away.
        self._address = LOCAL if settings.address is None else ray.util.get_node_ip_address()
        self._store = serve(self._address)
        self._generation = 0
        self._program = ""
        self._refused: list[str] = []
        self._fates: dict[Any, Literal["died", "hung"]] = {}
        self._snapshot: Any = None
        self._snapshot_at = 0.0
        self.members: list[Any] = []
        self.pending: list[_Pending] = []
        self.last_error = ""

    def request(self, count: int) -> None:
        """Ask for so many new workers; returns at once.

        Raises:
            HessianFlowError: a local cluster that can never have room for the smallest world.
        """
        settings = self._settings
        if settings.address is None:
            for name, each in (("CPU", settings.num_cpus), ("GPU", settings.num_gpus)):
                room = self._ray.cluster_resources().get(name, 0.0)
                if settings.min_workers * each > room:
                    raise HessianFlowError(
                        f"{settings.min_workers} workers of {each:g} {name}s need more than the"
                        f" {room:g} {name}s of this machine: lower --min-workers, or give the"
                        " address of a cluster"
                    )
        for _ in range(count):
            actor = self._new_member()
            self.pending.append(_Pending(actor, actor.program.remote(), time.monotonic()))
        if settings.address is not None:
            from ray.autoscaler.sdk import request_resources

            bundle = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
            wanted = {name: amount for name, amount in bundle.items() if amount > 0}
            request_resources(bundles=[wanted] * (len(self.members) + len(self.pending)))

    def cancel(self, count: int) -> None:
        """Give up the newcomers that were asked for last."""
        for _ in range(count):
            self._ray.kill(self.pending.pop().actor)

    def await_all(self, seconds: float) -> list[str]:
        """Wait for all newcomers and make them members; one that ends while it starts is asked for
        again.

        Returns:
            What is known of each that ended.

        Raises:
            HessianFlowError: they did not come in time, or more than a few of them ended.
        """
        deadline = time.monotonic() + seconds
        lost: list[str] = []
        while self.pending:
            refs = [p.ready for p in self.pending]
            left = max(0.0, deadline - time.monotonic())
            ready, late = self._ray.wait(refs, num_returns=len(refs), timeout=left)
            if late:
                raise HessianFlowError(
                    f"{len(ready)} of {len(refs)} workers came within {seconds:g} s; the cluster"
                    f" has {self._ray.available_resources()} free: lower --min-workers, or wait for"
                    " nodes"
                )
            self.admit()
            new = self.drop_failed()
            lost += new
            if len(lost) > MAX_LOST_NEWCOMERS:
                raise HessianFlowError(
                    f"{len(lost)} new workers in a row were of no use, the last {lost[-1]}; look at"
                    " the workers' logs"
                )
            self.request(len(new))
        return lost

    def arrived(self) -> bool:
        """Return whether a newcomer is ready."""
        refs = [p.ready for p in self.pending]
        return bool(refs) and bool(self._ray.wait(refs, timeout=0)[0])

    def newly_overdue(self) -> int:
        """Newcomers that have become late since the last call; they are still taken when they
        come."""
        now = time.monotonic()
        late = [
            p
            for p in self.pending
            if not p.overdue and now - p.asked_at > self._settings.start_seconds
        ]
        for newcomer in late:
            newcomer.overdue = True
        return len(late)

    def drop_failed(self) -> list[str]:
        """Forget newcomers that ended while they started, or run other code; returns what is known
        of each."""
        self._sort_out()
        refused, self._refused = self._refused, []
        return refused

    def admit(self) -> int:
        """Make the newcomers that are ready members; returns how many.

        Raises:
            HessianFlowError: the first workers run different programs.
            Exception: what the `build` of one of the first workers raised.
        """
        self._sort_out()
        ready = [newcomer for newcomer in self.pending if newcomer.program]
        for newcomer in ready:
            if newcomer.program != (self._program or newcomer.program):
                raise HessianFlowError(
                    f"all workers must run the same code: one has {self._program}, another"
                    f" {newcomer.program}; install the same versions of hessianflow and torch"
                    " everywhere"
                )
            self._program = newcomer.program
        self.members += [newcomer.actor for newcomer in ready]
        self.pending = [newcomer for newcomer in self.pending if not newcomer.program]
        return len(ready)

    def part(self, leaving: int) -> bool:
        """Have all members leave their generation, the last `leaving` for good; return False when
        some member failed."""
        if self._ask("leave") is None:
            return False
        keep = len(self.members) - leaving
        for actor in self.members[keep:]:
            self._ray.kill(actor)
        del self.members[keep:]
        return True

    def regroup(self, *, share_state: bool) -> JobReport | None:
        """Form the next generation of all members; None when some member failed."""
        self._generation += 1
        timeout = self._settings.timeout_seconds
        size = len(self.members)
        arguments = [
            (
                Generation(self._generation, rank, size),
                self._address,
                self._store.port,
                share_state,
                timeout,
            )
            for rank in range(size)
        ]
        reports: list[JobReport] | None = self._ask(
            "enter", arguments, recoverable=(RuntimeError, HessianFlowError)
        )
        return None if reports is None else reports[0]

    def run_until(
        self, updates: int, start: int, seconds: float
    ) -> tuple[JobReport, list[float], Sequence[Row]] | None:
        """Train all members until so many updates; None when one failed, or took longer than
        `seconds`.

        Returns:
            The report, each rank's seconds spent computing, and the records from number `start` on.
        """
        answers = self._ask("run_until", [(updates, start)] * len(self.members), seconds=seconds)
        return (
            None
            if answers is None
            else (answers[0][0], [busy for _, busy, _ in answers], answers[0][2])
        )

    def describe(self) -> Row | None:
        """Return what rank 0's job says of itself; None when some member failed."""
        answers = self._ask("describe")
        return None if answers is None else answers[0]

    def bury(self) -> list[tuple[Literal["died", "hung"], str]]:
        """Let the survivors of a failure leave their generation, the most advanced first; end the
        others."""
        aborted = {
            actor: actor.abort.remote() for actor in self.members if actor not in self._fates
        }
        answered = self._answers(aborted, time.monotonic() + GRACE_SECONDS, GRACE_SECONDS)
        survivors = sorted(
            (a for a in aborted if a in answered), key=lambda actor: -answered[actor]
        )
        lost = [(self._fates[a], rank) for rank, a in enumerate(self.members) if a in self._fates]
        for actor in self._fates:
            self._ray.kill(actor)
        self.members = survivors
        self._fates.clear()
        return [
            (fate, f"rank {rank} of generation {self._generation} {fate}") for fate, rank in lost
        ]

    def take_snapshot(self) -> bool:
        """Keep rank 0's state in the object store; False, and the one before stays, if rank 0 is in
        trouble."""
        source = self.members[0]
        taken, snapshot = source.snapshot.options(num_returns=2).remote()
        answers = self._answers(
            {source: taken}, time.monotonic() + self._settings.timeout_seconds, 0.0
        )
        self._snapshot_at = time.monotonic()
        if source in answers:
            self._snapshot = snapshot
        return source in answers

    @property
    def snapshot_is_due(self) -> bool:
        """Whether the last one is old enough."""
        return (
            bool(self.members)
            and time.monotonic() - self._snapshot_at > self._settings.snapshot_seconds
        )

    def snapshot(self) -> Any:
        """Return the state last kept.

        Raises:
            HessianFlowError: it is lost.
        """
        try:
            return unpack(*self._ray.get(self._snapshot))
        except self._ray.exceptions.ObjectLostError as error:
            raise _lost_snapshot(error) from error

    def keep(self, state: Any) -> None:
        """Take `state` for the last snapshot."""
        self._snapshot = self._ray.put(pack(state))

    def restore(self) -> bool:
        """Give the last snapshot to rank 0, or nothing where there is none yet; False if rank 0 is
        in trouble.

        Raises:
            HessianFlowError: the snapshot is lost.
        """
        if self._snapshot is None:
            return True
        first = self.members[0]
        patience = self._settings.timeout_seconds + GRACE_SECONDS
        asked = {first: first.restore.remote(self._snapshot)}
        return first in self._answers(asked, time.monotonic() + patience, 0.0)

    def close(self) -> None:
        """End all workers and withdraw the request for room."""
        for actor in [*self.members, *(p.actor for p in self.pending)]:
            self._ray.kill(actor)
        if self._settings.address is not None:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[])

    def _sort_out(self) -> None:
        """Ask the newcomers that are ready for their program, and drop those that cannot be
        used."""
        for newcomer in [
            p for p in self.pending if not p.program and self._ray.wait([p.ready], timeout=0)[0]
        ]:
            try:
                newcomer.program = self._ray.get(newcomer.ready)
            except endings(self._ray) as error:
                self._refuse(newcomer, f"died while it started: {first_line(error)}")
            except self._ray.exceptions.RayTaskError as error:
                if not self._program:  # nobody has built the job yet: it is no fault of this worker
                    raise _own_error(error) from None
                self._refuse(newcomer, f"could not build its job: {first_line(error.cause)}")
            else:
                if newcomer.program != (self._program or newcomer.program):
                    self._refuse(
                        newcomer,
                        f"runs other code ({newcomer.program}) than the others ({self._program})",
                    )

    def _refuse(self, newcomer: _Pending, reason: str) -> None:
        self._refused.append(reason)
        self.pending.remove(newcomer)
        self._ray.kill(newcomer.actor)

    def _ask(
        self,
        method: str,
        arguments: list[Any] | None = None,
        *,
        seconds: float | None = None,
        recoverable: tuple[type[Exception], ...] = (RuntimeError,),
    ) -> list[Any] | None:
        """Call a method of all members at once; None when a member died, hung or failed
        recoverably.

        Any other error of a member is its job's own and is raised.
        """
        given = [()] * len(self.members) if arguments is None else arguments
        refs = {
            a: getattr(a, method).remote(*args) for a, args in zip(self.members, given, strict=True)
        }
        patience = self._settings.timeout_seconds + GRACE_SECONDS if seconds is None else seconds
        answers = self._answers(refs, time.monotonic() + patience, GRACE_SECONDS, recoverable)
        return [answers[a] for a in self.members] if len(answers) == len(refs) else None

    def _answers(
        self,
        refs: dict[Any, Any],
        deadline: float,
        grace: float,
        recoverable: tuple[type[Exception], ...] = (RuntimeError,),
    ) -> dict[Any, Any]:
        """Return the answers that came; who died or hung is noted in `_fates`."""
        actors = {ref: actor for actor, ref in refs.items()}
        answers: dict[Any, Any] = {}
        left = list(actors)
        while left:
            done, left = self._ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self._fates.update((actors[ref], "hung") for ref in left)
                self.last_error = f"{len(left)} members did not answer"
                break
            try:
                answers[actors[done[0]]] = self._ray.get(done[0])
                continue
            except endings(self._ray) as error:
                self._fates[actors[done[0]]] = "died"
                self.last_error = first_line(error)
            except self._ray.exceptions.ObjectLostError as error:
                raise _lost_snapshot(error) from error
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, recoverable):
                    raise _own_error(error) from None
                self.last_error = first_line(error.cause)
            deadline = min(deadline, time.monotonic() + grace)
        return answers


def _own_error(error: Any) -> Exception:
    """Return what a member's job raised: as itself where it says what to do, else as Ray's
    exception, with its traceback."""
    return error.cause if isinstance(error.cause, HessianFlowError) else error


def _lost_snapshot(error: Exception) -> HessianFlowError:
    return HessianFlowError(
        f"the last snapshot is lost with the node that held it ({first_line(error)}): resume from"
        " the run directory"
    )
