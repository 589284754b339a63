"""Elastic training on Ray: workers join, leave and fail while the run continues.

Ray places worker processes, watches them and asks the cluster for room; torch.distributed moves
gradients. The members of one generation train a stretch of updates, report, and train the next,
without ending their processes. Between two stretches the world may change: members leave the group
(milliseconds), a new one is formed under the next generation's prefix in the same key-value store,
and newcomers receive the state by broadcast. Newcomers start, import and build their job while the
others train, also on a cluster that is slow or has no room at first.

Faults: when a member dies, the others fail in their next sum; when one hangs, after
`timeout_seconds`. The survivors leave that generation, the most advanced becomes rank 0, and all
continue from its last complete update; the interrupted batch is trained again and counted once.
Without survivors the run continues from the last snapshot. If this process itself ends, only the
job's own checkpoints remain.
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
"""Failures without an update completed in between after which a run gives up: our choice."""

SLOW_STRETCHES = 3
"""Stretches in a row in which a rank must be slow to be recorded as such: our choice."""


@dataclass(frozen=True)
class ElasticEvent:
    """A change of the world, or a reason for one.

    Attributes:
        kind, message: Kind and description of the event.
        seconds: Seconds since the run began.
        updates, examples: Updates and examples, over all ranks, completed by then.
        workers: Workers in the world after the event.
        pause: Seconds for which training paused.
    """

    kind: EventKind
    seconds: float
    updates: int
    examples: int
    workers: int
    message: str
    pause: float = 0.0


Policy = Callable[[JobReport, Sequence[Sample]], int]
"""Function that is called as policy(report, samples) and returns the number of workers from the
next boundary on, which is clipped to the bounds of the settings."""


@dataclass
class ElasticRun:
    """Trains a job on a changing number of workers.

    Args:
        build: Function that makes the job, in each worker's process.
        policy: Function that returns the number of workers, for example by
            :func:`~hessianflow.elastic.policy.workers_for`.
        settings: Bounds, times and resources of the run.
        on_event: Function called with each event as it happens.
        on_rows: Function called as on_rows(start, rows) with the job's records from number `start`
            on. A run that continues from a snapshot makes later records again.
        on_snapshot: Function called with the job's state after every snapshot, also at the end.
        start_from: State to continue from.

    Attributes:
        description: Description of rank 0's job, from the start and then from the end.
        events, samples: All events, and the throughput of every stretch.

    Raises:
        HessianFlowError: Ray is not installed or failed, there is no room for `min_workers`, there
            were too many failures in a row, or a worker raised it (its other errors are Ray's).
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
        """Make `run` return at the next boundary, after a snapshot (safe in a signal handler)."""
        self._stopping = True

    def run(self) -> JobReport:
        """Train to the end, or until a stop is requested, and return the last report."""
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
            report = self._report
            kind: EventKind = "finished" if report.done else "stopped"
            self._record(kind, f"{report.examples} examples in {report.updates} updates")
            return report
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
        """Start the missing workers and form the first generation; return False if one failed."""
        cluster = self._cluster
        cluster.request(self.settings.min_workers - len(cluster.members) - len(cluster.pending))
        reasons = cluster.await_all(self.settings.start_seconds)
        lost += [f"a new worker {reason}" for reason in reasons]
        if not cluster.restore():
            return False
        report = cluster.regroup(share_state=True)
        description = None if report is None else cluster.describe()
        if report is None or description is None:
            return False
        self._report = report
        self.description = description
        return True

    def _train_stretch(self) -> None:
        began = time.monotonic()
        expected = 10 * self.settings.stretch_seconds + self.settings.timeout_seconds
        last = self._report.updates + self._stretch
        outcome = self._cluster.run_until(last, self._rows, expected)
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
        """Take the last snapshot if the run is to end, and return whether it has ended.

        If a member fails at this, the run continues without it.
        """
        if not (self._report.done or self._stopping):
            return False
        description = self._cluster.describe()
        if description is None or not self._take_snapshot():
            self._recover()
            return False
        self.description = description
        return True

    def _take_snapshot(self) -> bool:
        taken = self._cluster.take_snapshot()
        if taken and self.on_snapshot is not None:
            self.on_snapshot(self._cluster.snapshot())
            if not self._report.keep:  # snapshots at the end of every epoch are no events
                self._record("snapshot", "state written")
        return taken

    def _measure(self, report: JobReport, seconds: float) -> None:
        before = self._report
        self._report = report
        updates = report.updates - before.updates
        if updates > 0:
            elapsed = time.monotonic() - self._began
            rate = (report.examples - before.examples) / seconds
            workers = len(self._cluster.members)
            self.samples.append(Sample(elapsed, workers, before.batch_size, report.examples, rate))
            fitting = int(self.settings.stretch_seconds / (seconds / updates))
            # At most double, since one short stretch says little about the next, whose batch may
            # have grown.
            self._stretch = max(1, min(2 * self._stretch, fitting))

    def _resize(self) -> None:
        workers = self.policy(self._report, self.samples)
        workers = min(self.settings.max_workers, max(self.settings.min_workers, workers))
        self._note_refusals()
        present = len(self._cluster.members)
        coming = len(self._cluster.pending)
        missing = workers - present - coming
        if missing > 0 and time.monotonic() >= self._ask_again_at:
            self._cluster.request(missing)
            self._record("requested", f"{missing} more for a batch of {self._report.batch_size}")
        elif missing < 0:
            self._cluster.cancel(min(coming, -missing))
        leaving = max(0, present - workers)
        if leaving or self._cluster.arrived():
            self._change_world(leaving)

    def _change_world(self, leaving: int) -> None:
        began = time.monotonic()
        before = len(self._cluster.members)
        if not self._cluster.disband(leaving):
            self._recover()
            return
        joined = self._cluster.admit()
        if not self._reform(share_state=joined > 0):
            return
        kind: EventKind = "joined" if joined else "left"
        message = f"{before} -> {len(self._cluster.members)} workers"
        self._record(kind, message, time.monotonic() - began)

    def _recover(self) -> None:
        """Continue with the members that are left, or from the last snapshot."""
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
        """Form the next generation; return False if that failed and the run recovered."""
        report = self._cluster.regroup(share_state=share_state)
        if report is None:
            self._recover()
            return False
        self._report = report
        self._rows = min(self._rows, report.rows)
        self._slow.clear()
        return True

    def _note_refusals(self) -> None:
        patience = self.settings.start_seconds
        for _ in range(self._cluster.newly_overdue()):
            self._record("refused", f"no new worker after {patience:g} s; training goes on without")
        for reason in self._cluster.drop_failed():
            self._ask_again_at = time.monotonic() + patience
            self._record("refused", f"a new worker {reason}")

    def _note_slow(self, busy: Sequence[float]) -> None:
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow_workers(busy)}
        for rank, stretches in self._slow.items():
            if stretches == SLOW_STRETCHES:
                fastest = f"the fastest {min(busy):.2f} s"
                self._record("slow", f"rank {rank} computed {busy[rank]:.2f} s, {fastest}")

    def _record(self, kind: EventKind, message: str, pause: float = 0.0) -> None:
        done = (self._report.updates, self._report.examples)
        workers = len(self._cluster.members)
        elapsed = time.monotonic() - self._began
        event = ElasticEvent(kind, elapsed, *done, workers, message, pause)
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
