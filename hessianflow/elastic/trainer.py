"""The process that starts an elastic run and writes its config, history, checkpoints and summary.

Workers join and leave, so none of them owns the run directory. They send their records at every
boundary, and their state at the end of every epoch and at regular intervals. When a run continues
from a snapshot, the records to be made again are dropped; those of changes of the world stay.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hessianflow.checks import in_home
from hessianflow.elastic.job import TrainerJob
from hessianflow.elastic.member import JobReport
from hessianflow.elastic.policy import Sample, workers_for
from hessianflow.elastic.run import ElasticEvent, ElasticRun, Policy
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError, Progress, RecordSink, World
from hessianflow.runs import History, Recorder, checkpoints, rows
from hessianflow.runs.folder import history_length, refuse_used
from hessianflow.runs.names import BEST, CHECKPOINTS, LAST
from hessianflow.runs.rows import Record
from hessianflow.runs.states import check_training_state
from hessianflow.training import AdaptiveBatchTrainer
from hessianflow.training.saving import Checkpoints, Saver

THROUGHPUT_SHARE = 0.01
"""Fraction of the run, and a second, that pass between two rows of throughput: our choice."""


class ElasticTrainer:
    """Trains on Ray with a number of workers that follows the batch size.

    Args:
        make: Function that builds a trainer for a world, in each worker's process: it can be
            imported there, and sets `run_dir=None`.
        settings: Bounds, times and resources of the run.
        run_dir: Folder of the records, on this machine.
        config: Settings to write to config.json beside the trainer's own.
        sinks: Further receivers of every record.
        keep_checkpoints: Number of the newest checkpoints that are kept.
        policy: Policy of :class:`hessianflow.elastic.ElasticRun`; None for
            :func:`hessianflow.elastic.workers_for`.

    Raises:
        HessianFlowError: The run directory is in use, or the `ElasticRun` raised it.
    """

    def __init__(
        self,
        make: Callable[[World], AdaptiveBatchTrainer],
        settings: ElasticSettings,
        *,
        run_dir: str | Path,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        keep_checkpoints: int = 2,
        policy: Policy | None = None,
    ) -> None:
        self._settings = settings
        self._config = dict(config or {})
        self._policy = policy or self._by_batch
        self._record = Recorder(run_dir, sinks)
        self._folder = in_home(run_dir)
        self._saver = Saver(Checkpoints(keep=keep_checkpoints))
        self._run = ElasticRun(
            partial(TrainerJob, make), self._workers, settings, self._on_event, self._on_rows
        )
        self._run.on_snapshot = self._on_snapshot
        self._from_job: list[bool] = []
        self._best: float | None = None
        self._warning: str | None = None
        self._written = Sample(0.0, 0, 0, 0, 0.0)

    def fit(self) -> History:
        """Train for all epochs and return the records."""
        refuse_used(self._folder)
        return self._train()

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run, elastic or not, of the same settings.

        Raises:
            HessianFlowError: The directory has no usable checkpoint of this model and data set.
        """
        self._folder = in_home(run_dir)
        try:
            state, warning = self._newest()
        except HessianFlowError:
            self._record.close()
            raise
        self._from_job = [True] * len(self._record.records)
        self._best = state["counters"]["best"]
        self._run.start_from = {"trainer": state, "rows": list(self._record.records)}
        self._warning = warning
        return self._train()

    def _newest(self) -> tuple[dict[str, Any], str | None]:
        """Hold the run directory, read its newest usable checkpoint, set a damaged one aside."""
        self._record.hold(self._folder)
        kept = self._folder / CHECKPOINTS
        length = history_length(self._folder)
        state, _, warning = checkpoints.load_newest(kept, length, check_training_state)
        self._record.reopen(self._folder, state["history_bytes"])
        if warning is not None:
            checkpoints.set_aside(kept)
        return state, warning

    def request_stop(self) -> None:
        """Save and end the run within about a second (safe in a signal handler)."""
        self._run.request_stop()

    def _train(self) -> History:
        try:
            self._run.run()
            events = self._run.events
            kinds = Counter(event.kind for event in events)
            summary = {
                **self._run.description["summary"],
                "world_size": max(event.workers for event in events),
                "world_changes": kinds["joined"] + kinds["left"] + kinds["restored"],
                "workers_lost": kinds["died"] + kinds["hung"],
                "seconds_paused": sum(event.pause for event in events),
            }
            self._record.finish(summary)
        finally:
            self._record.close()
        return self._record.history()

    def _workers(self, report: JobReport, samples: Sequence[Sample]) -> int:
        self._write_throughput(report, samples)
        return self._policy(report, samples)

    def _by_batch(self, report: JobReport, samples: Sequence[Sample]) -> int:
        return workers_for(
            report.batch_size,
            report.microbatch_size,
            samples,
            min_workers=self._settings.min_workers,
            max_workers=self._settings.max_workers,
        )

    def _write_throughput(self, report: JobReport, samples: Sequence[Sample]) -> None:
        """Write a row at intervals, and whenever the world or the batch has changed."""
        new = [sample for sample in samples if sample.seconds > self._written.seconds]
        if not new:
            return
        last = new[-1]
        first = self._written
        same = (last.workers, last.batch_size) == (first.workers, first.batch_size)
        if same and last.seconds - first.seconds < 1 + THROUGHPUT_SHARE * last.seconds:
            return
        row = {
            **rows.place("throughput", self._progress(report.updates, report.examples)),
            "elapsed": last.seconds,
            "workers": last.workers,
            "batch_size": last.batch_size,
            "examples_per_second": last.examples_per_second,
        }
        self._write(row)
        self._written = last

    def _on_event(self, event: ElasticEvent) -> None:
        trainer = self._run.description["trainer"]
        if event.kind == "started" and not self._record.records and self._run.start_from is None:
            self._record.start({**self._config, "trainer": trainer})
        progress = self._progress(event.updates, event.examples)
        if event.kind == "started" and self._warning is not None:
            self._write(rows.event_row(progress, "fallback", self._warning))
        row = rows.event_row(progress, event.kind, event.message)
        world = {"elapsed": event.seconds, "workers": event.workers, "pause": event.pause}
        self._write({**row, **world})

    def _on_rows(self, start: int, new: Sequence[Mapping[str, Any]]) -> None:
        if start < sum(self._from_job):
            self._drop_from(start)
        for row in new:
            self._write(dict(row), from_job=True)

    def _drop_from(self, start: int) -> None:
        """Drop the job's rows from number `start` on, since they are made again."""
        dropped = set([n for n, from_job in enumerate(self._from_job) if from_job][start:])
        kept = [number for number in range(len(self._from_job)) if number not in dropped]
        self._record.replace([self._record.records[number] for number in kept])
        self._from_job = [self._from_job[number] for number in kept]

    def _on_snapshot(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, also as the best one if the accuracy has never been higher."""
        trainer = {**state["trainer"], "history_bytes": self._record.sync()}
        best = trainer["counters"]["best"]
        self._saver.save(self._folder, trainer, LAST)
        if best is not None and (self._best is None or best > self._best):
            self._best = best
            self._saver.save(self._folder, trainer, BEST)

    def _write(self, row: Record, *, from_job: bool = False) -> None:
        self._from_job.append(from_job)
        self._record.write(row)

    def _progress(self, updates: int, examples: int) -> Progress:
        trainer = self._run.description["trainer"]
        per_epoch = trainer["examples_per_epoch"]
        return Progress(examples // per_epoch, examples, updates, per_epoch, trainer["epochs"])
