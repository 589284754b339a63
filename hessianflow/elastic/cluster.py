"""The members of an elastic run: grouped into generations, trained, and replaced after failures."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hessianflow.distributed.process_group import Generation
from hessianflow.distributed.ray_session import endings
from hessianflow.distributed.state import pack, unpack
from hessianflow.distributed.store import LOCAL, serve
from hessianflow.elastic.member import ElasticJob, JobReport, Row
from hessianflow.elastic.pool import WorkerPool, own_error
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError
from hessianflow.interfaces.errors import first_line

GRACE_SECONDS = 5.0
"""Time to wait, by our choice, for members that have not answered once another has failed."""


class Cluster(WorkerPool):
    """A pool of workers whose members form the current generation of a group.

    `last_error` is the message of the last failure.
    """

    def __init__(
        self, ray: Any, build: Callable[[], ElasticJob], settings: ElasticSettings
    ) -> None:
        super().__init__(ray, build, settings)
        # The store is in this process, so that it outlives every worker.
        self._address = LOCAL if settings.address is None else ray.util.get_node_ip_address()
        self._store = serve(self._address)
        self._generation = 0
        self._fates: dict[Any, Literal["died", "hung"]] = {}
        self._snapshot: Any = None
        self._snapshot_at = 0.0
        self.last_error = ""

    def disband(self, leaving: int) -> bool:
        """End the generation, and the last `leaving` members; return False if a member failed."""
        if self._ask("leave") is None:
            return False
        keep = len(self.members) - leaving
        for actor in self.members[keep:]:
            self._ray.kill(actor)
        del self.members[keep:]
        return True

    def regroup(self, *, share_state: bool) -> JobReport | None:
        """Form the next generation of all members; return None if a member failed."""
        self._generation += 1
        size = len(self.members)
        common = (self._address, self._store.port, share_state, self._settings.timeout_seconds)
        arguments = [(Generation(self._generation, rank, size), *common) for rank in range(size)]
        reports: list[JobReport] | None = self._ask(
            "enter", arguments, recoverable=(RuntimeError, HessianFlowError)
        )
        return None if reports is None else reports[0]

    def run_until(
        self, updates: int, start: int, seconds: float
    ) -> tuple[JobReport, list[float], Sequence[Row]] | None:
        """Train all members until `updates` updates, within `seconds`; return None if one failed.

        Returns:
            The report, each rank's seconds spent computing, and the records from number `start` on.
        """
        answers = self._ask("run_until", [(updates, start)] * len(self.members), seconds=seconds)
        if answers is None:
            return None
        report, _, rows = answers[0]
        return report, [busy for _, busy, _ in answers], rows

    def describe(self) -> Row | None:
        """Return the description of rank 0's job; None if a member failed."""
        answers = self._ask("describe")
        return None if answers is None else answers[0]

    def bury(self) -> list[tuple[Literal["died", "hung"], str]]:
        """Keep the survivors, the most advanced first; return fate and description of the lost."""
        aborted = {a: a.abort.remote() for a in self.members if a not in self._fates}
        answered = self._answers(aborted, GRACE_SECONDS, GRACE_SECONDS)
        survivors = [actor for actor in aborted if actor in answered]
        lost = [(self._fates[a], rank) for rank, a in enumerate(self.members) if a in self._fates]
        for actor in self._fates:
            self._ray.kill(actor)
        self.members = sorted(survivors, key=lambda actor: -answered[actor])
        self._fates.clear()
        group = f"of generation {self._generation}"
        return [(fate, f"rank {rank} {group} {fate}") for fate, rank in lost]

    def take_snapshot(self) -> bool:
        """Keep rank 0's state in the object store; if it fails, return False and keep the last."""
        source = self.members[0]
        taken, snapshot = source.snapshot.options(num_returns=2).remote()
        answers = self._answers({source: taken}, self._settings.timeout_seconds)
        self._snapshot_at = time.monotonic()
        if source in answers:
            self._snapshot = snapshot
        return source in answers

    @property
    def snapshot_is_due(self) -> bool:
        """Return whether the last snapshot is old enough for a new one."""
        age = time.monotonic() - self._snapshot_at
        return bool(self.members) and age > self._settings.snapshot_seconds

    def snapshot(self) -> Any:
        """Return the state of the last snapshot, and refuse to go on if it is lost."""
        try:
            return unpack(*self._ray.get(self._snapshot))
        except self._ray.exceptions.ObjectLostError as error:
            raise _lost_snapshot(error) from error

    def keep(self, state: Any) -> None:
        """Make `state` the last snapshot."""
        self._snapshot = self._ray.put(pack(state))

    def restore(self) -> bool:
        """Give the last snapshot, if there is one, to rank 0; return False if rank 0 failed.

        Raises:
            HessianFlowError: The snapshot is lost.
        """
        if self._snapshot is None:
            return True
        first = self.members[0]
        asked = {first: first.restore.remote(self._snapshot)}
        return first in self._answers(asked, self._settings.timeout_seconds + GRACE_SECONDS)

    def _ask(
        self,
        method: str,
        arguments: list[Any] | None = None,
        *,
        seconds: float | None = None,
        recoverable: tuple[type[Exception], ...] = (RuntimeError,),
    ) -> list[Any] | None:
        """Call a method of all members at once, and return their answers in the order of ranks.

        It is None if a member died, hung or failed recoverably; any other error is raised.
        """
        if arguments is None:
            arguments = [()] * len(self.members)
        if seconds is None:
            seconds = self._settings.timeout_seconds + GRACE_SECONDS
        refs = {
            actor: getattr(actor, method).remote(*own)
            for actor, own in zip(self.members, arguments, strict=True)
        }
        answers = self._answers(refs, seconds, GRACE_SECONDS, recoverable)
        if len(answers) < len(refs):
            return None
        return [answers[actor] for actor in self.members]

    def _answers(
        self,
        refs: dict[Any, Any],
        seconds: float,
        grace: float = 0.0,
        recoverable: tuple[type[Exception], ...] = (RuntimeError,),
    ) -> dict[Any, Any]:
        """Return the answers that arrived, and note in `_fates` which members died or hung."""
        deadline = time.monotonic() + seconds
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
                    raise own_error(error) from None
                self.last_error = first_line(error.cause)
            deadline = min(deadline, time.monotonic() + grace)
        return answers


def _lost_snapshot(error: Exception) -> HessianFlowError:
    return HessianFlowError(
        f"the last snapshot is lost with the node that held it ({first_line(error)}): resume from"
        " the run directory"
    )
