"""Elastic training on Ray: workers come, go and fail while the run goes on.

Ray places worker processes, watches them and asks the cluster for room; torch.distributed moves
gradients. The members of one generation train a stretch of updates, report, and train the next,
without ending their processes. Between two stretches the world may change: members leave the group
(milliseconds), a new one is formed under the next generation's prefix in the same key-value store,
and newcomers receive the state by broadcast. Newcomers start, import and build their job while the
others train; a cluster that is slow or has no room is waited for in the same way, without waiting.

Faults: a member that dies makes the others fail in their next sum; one that hangs, after
`timeout_seconds`. The survivors leave that generation, the most advanced becomes rank 0, and all go
on from its last complete update; the batch that was under way is trained again and counted once.
Without survivors the run goes on from the last snapshot. When this process itself ends, the job's
own checkpoints are what is left.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hessianflow.distributed.ray_session import connect, told_in_one_line
from hessianflow.elastic.cluster import Cluster
from hessianflow.elastic.member import ElasticJob, JobReport, Row
from hessianflow.elastic.policy import Sample, slow_workers
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError

Trouble = Literal["died", "hung", "slow", "restored", "refused"]
EventKind = (
    Trouble | Literal["started", "requested", "joined", "left", "snapshot", "stopped", "finished"]
)

MAX_FAILURES = 5
"""Failures in a row, without an update completed in between, after which a run gives up. Ours."""

SLOW_STRETCHES = 3
"""Stretches in a row in which a rank must be slow before that is recorded. Ours."""


@dataclass(frozen=True)
class ElasticEvent:
    """One change of the world, or a reason for one.

    Attributes:
        kind: what happened.
        seconds: since the run began.
        updates: completed by then.
        examples: trained by then, over all ranks.
        workers: in the world after it.
        message: in words.
        pause: seconds for which training stood still.
    """

    kind: EventKind
    seconds: float
    updates: int
    examples: int
    workers: int
    message: str
    pause: float = 0.0


Policy = Callable[[JobReport, Sequence[Sample]], int]
"""policy(report, samples) -> workers wanted from the next boundary on; clipped to the settings'
bounds."""


@dataclass
class ElasticRun:
    """Trains a job on a changing number of workers.

    Args:
        build: makes the job, in each worker's process.
        policy: how many workers to have; such as one made of
            :func:`~hessianflow.elastic.policy.workers_for`.
        settings: see :class:`ElasticSettings`.
        on_event: called with each event as it happens.
        on_rows: on_rows(start, rows): the job's records from number `start` on, whose number it may
            have had before: a run that goes on from a snapshot makes them again.
        on_snapshot: called with the job's state whenever a snapshot was taken, at the end too; to
            be written to disk.
        start_from: a state to go on from.

    Attributes:
        description: what rank 0's job said of itself, at the start and then at the end.
        events: all of them.
        samples: throughput of every stretch.

    Raises:
        HessianFlowError: no Ray, or Ray itself failed; no room for `min_workers`; too many failures
            in a row. A worker's own error comes as itself where it is a HessianFlowError, else as
            Ray's exception of it.
    """

    build: Callable[[], ElasticJob]
    policy: Policy
    settings: ElasticSettings
    on_event: Callable[[ElasticEvent], None] | None = None
    on_rows: Callable[[int, Sequence[Row]], None] | None = None
    on_snapshot: Callable[[Any], None] | None = None
    start_from: Any = None
    description: Row = field(default_factory=dict, init=False)
    events: list[ElasticEvent] = field(default_factory=list, init=False)
    samples: list[Sample] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._stopping = False

    def request_stop(self) -> None:
        """Let `run` return at the next boundary, after a snapshot (safe in a signal handler)."""
        self._stopping = True

    def run(self) -> JobReport:
        """Train to the end, or until asked to stop; returns the last report."""
        ray = connect(self.settings.address)
        self._began = time.monotonic()
        self._cluster = Cluster(ray, self.build, self.settings)
        self._slow: dict[int, int] = {}
        self._ask_again_at = self._began
        with told_in_one_line(ray):
            return self._run()

    def _run(self) -> JobReport:
        try:
            self._start()
            while not self._ended():
                self._train_stretch()
            kind: EventKind = "finished" if self._report.done else "stopped"
            self._record(
                kind, f"{self._report.examples} examples in {self._report.updates} updates"
            )
            return self._report
        finally:
            self._cluster.close()

    def _start(self) -> None:
        if self.start_from is not None:
            self._cluster.keep(self.start_from)
        lost: list[str] = []
        for _ in range(MAX_FAILURES + 1):
            if self._form_first(lost):
                break
            lost += [what for _, what in self._cluster.bury()]
        else:
            raise HessianFlowError(
                f"the first workers could not form a group: {self._cluster.last_error}; look at the"
                " workers' logs"
            )
        self._rows = self._report.rows
        self._failures = 0
        self._stretch = 1
        self._record("started", f"{len(self._cluster.members)} workers")
        for reason in lost:
            self._record("refused", f"{reason}; another was asked for")
        self._take_snapshot()

    def _form_first(self, lost: list[str]) -> bool:
        """Start the workers that lack and let all form a generation; False when one of them
        failed."""
        cluster = self._cluster
        cluster.request(self.settings.min_workers - len(cluster.members) - len(cluster.pending))
        lost += [
            f"a new worker {reason}" for reason in cluster.await_all(self.settings.start_seconds)
        ]
        report = cluster.regroup(share_state=True) if cluster.restore() else None
        found = None if report is None else cluster.describe()
        if report is None or found is None:
            return False
        self._report = report
        self.description = found
        return True

    def _train_stretch(self) -> None:
        began = time.monotonic()
        expected = 10 * self.settings.stretch_seconds + self.settings.timeout_seconds
        outcome = self._cluster.run_until(
            self._report.updates + self._stretch, self._rows, expected
        )
        if outcome is None:
            self._recover()
            return
        report, busy, rows = outcome
        if rows and self.on_rows is not None:
            self.on_rows(self._rows, rows)
        self._rows += len(rows)
        self._measure(report, time.monotonic() - began)
        self._note_slow(busy)
        self._failures = 0
        if not report.done:
            if report.keep or self._cluster.snapshot_is_due:
                self._take_snapshot()
            self._resize()

    def _ended(self) -> bool:
        """Return whether nothing is left to do, the last snapshot included; when a member fails at
        that, go on without it."""
        if not (self._report.done or self._stopping):
            return False
        found = self._cluster.describe()
        if found is None or not self._take_snapshot():
            self._recover()
            return False
        self.description = found
        return True

    def _take_snapshot(self) -> bool:
        taken = self._cluster.take_snapshot()
        if taken and self.on_snapshot is not None:
            self.on_snapshot(self._cluster.snapshot())
            if not self._report.keep:  # what is kept at the end of every epoch is no event
                self._record("snapshot", "state written")
        return taken

    def _measure(self, report: JobReport, seconds: float) -> None:
        updates, examples = (
            report.updates - self._report.updates,
            report.examples - self._report.examples,
        )
        batch_size, self._report = self._report.batch_size, report
        if updates > 0:
            now, workers = time.monotonic() - self._began, len(self._cluster.members)
            self.samples.append(
                Sample(now, workers, batch_size, report.examples, examples / seconds)
            )
            per_update = seconds / updates
            # At most double: one short stretch says little about the next, whose batch may have
            # grown.
            self._stretch = max(
                1, min(2 * self._stretch, int(self.settings.stretch_seconds / per_update))
            )

    def _resize(self) -> None:
        wanted = self.policy(self._report, self.samples)
        wanted = min(self.settings.max_workers, max(self.settings.min_workers, wanted))
        self._note_refusals()
        present, coming = len(self._cluster.members), len(self._cluster.pending)
        if wanted > present + coming and time.monotonic() >= self._ask_again_at:
            self._cluster.request(wanted - present - coming)
            self._record(
                "requested",
                f"{wanted - present - coming} more for a batch of {self._report.batch_size}",
            )
        elif wanted < present + coming:
            self._cluster.cancel(min(coming, present + coming - wanted))
        leaving = max(0, present - wanted)
        if leaving or self._cluster.arrived():
            self._change_world(leaving)

    def _change_world(self, leaving: int) -> None:
        began, before = time.monotonic(), len(self._cluster.members)
        if not self._cluster.part(leaving):
            self._recover()
            return
        joined = self._cluster.admit()
        if not self._reform(share_state=joined > 0):
            return
        pause, after = time.monotonic() - began, len(self._cluster.members)
        self._record("joined" if joined else "left", f"{before} -> {after} workers", pause)

    def _recover(self) -> None:
        """Go on with whoever is left, or from the last snapshot."""
        began = time.monotonic()
        self._failures += 1
        for kind, what in self._cluster.bury():
            self._record(kind, what)
        if self._failures > MAX_FAILURES:
            raise HessianFlowError(
                f"{self._failures} failures in a row at update {self._report.updates}, the last: "
                f"{self._cluster.last_error}; look at the workers' logs"
            )
        if not self._cluster.members:
            self._cluster.request(max(0, self.settings.min_workers - len(self._cluster.pending)))
            for reason in self._cluster.await_all(self.settings.start_seconds):
                self._record("refused", f"a new worker {reason}; another was asked for")
            if not self._cluster.restore():
                self._recover()
                return
        if self._reform(share_state=True):
            workers = len(self._cluster.members)
            message = f"{workers} workers go on from update {self._report.updates}"
            self._record("restored", message, time.monotonic() - began)

    def _reform(self, *, share_state: bool) -> bool:
        """Form the next generation; False when that failed and was recovered from."""
        report = self._cluster.regroup(share_state=share_state)
        if report is None:
            self._recover()
            return False
        self._report, self._rows = report, min(self._rows, report.rows)
        self._slow.clear()
        return True

    def _note_refusals(self) -> None:
        for _ in range(self._cluster.newly_overdue()):
            self._record(
                "refused",
                f"no new worker after {self.settings.start_seconds:g} s; training goes on without",
            )
        for reason in self._cluster.drop_failed():
            self._ask_again_at = time.monotonic() + self.settings.start_seconds
            self._record("refused", f"a new worker {reason}")

    def _note_slow(self, busy: Sequence[float]) -> None:
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow_workers(busy)}
        for rank, stretches in self._slow.items():
            if stretches == SLOW_STRETCHES:
                self._record(
                    "slow",
                    f"rank {rank} computed {busy[rank]:.2f} s, the fastest {min(busy):.2f} s",
                )

    def _record(self, kind: EventKind, message: str, pause: float = 0.0) -> None:
        now, workers = time.monotonic() - self._began, len(self._cluster.members)
        report = self._report
        event = ElasticEvent(kind, now, report.updates, report.examples, workers, message, pause)
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
