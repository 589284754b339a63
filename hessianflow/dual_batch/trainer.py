"""A run on a parameter server that leaves the same files as any other run: records, checkpoints,
summary.

Rows of its own: `commit`, one for each push (worker, when it started and finished on the server's
clock, staleness, batch size, loss). Rows of an epoch also hold `clock_seconds` (the server's clock:
the time model's in a simulation, the wall's on Ray), `predicted_seconds` (the sum of the plans'
target times), resolution and small batch size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hessianflow.checks import in_home
from hessianflow.control import DualBatchPlan, Stage
from hessianflow.dual_batch.local_training import FlatWeights, checkable, with_arrays
from hessianflow.dual_batch.simulated_server import Commit
from hessianflow.dual_batch.transports import Listener, Snapshot, Transport
from hessianflow.interfaces import Batch, Decision, HessianFlowError, LossFn, Progress, RecordSink
from hessianflow.runs import History, Recorder, checkpoints, rows
from hessianflow.runs.folder import history_length
from hessianflow.runs.names import BEST, CHECKPOINTS, LAST
from hessianflow.runs.states import check_dual_batch_state, check_finite, model_fault, restoring
from hessianflow.runs.summary import summary_of
from hessianflow.training import checkpoint, evaluate
from hessianflow.training.divergence import DivergenceError
from hessianflow.training.saving import Checkpoints, Saver
from hessianflow.training.timing import Stopwatch


@dataclass(frozen=True)
class Job:
    """What is trained, and by which plan.

    Attributes:
        model: where the server's weights are put to be evaluated and saved.
        eval_data: evaluated after every epoch.
        loss_fn: of the evaluation.
        recalibrate: measures the model's statistics of normalisation at full resolution.
        stage_at: stage and plan at an epoch.
        rate_at: learning rate at an epoch.
        workers: how many.
        epochs: passes over the training data; one is as many pushes as there are workers.
        examples: training examples.
    """

    model: nn.Module
    eval_data: Batch | Iterable[Batch]
    loss_fn: LossFn
    recalibrate: Callable[[], None]
    stage_at: Callable[[int], tuple[Stage, DualBatchPlan]]
    rate_at: Callable[[int], float]
    workers: int
    epochs: int
    examples: int


@dataclass
class _Counters:
    """Of the whole run, and, from `loss` on, of the epoch under way."""

    commits: int = 0
    examples: int = 0
    updates: int = 0
    clock: float = 0.0
    predicted: float = 0.0
    best: float | None = None
    training_seconds: float = 0.0
    loss: float = 0.0
    weight: float = 0.0
    correct: int = 0
    counted: float = 0.0
    trained: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class DualBatchTrainer:
    """Runs a :class:`Job` on a transport.

    Args:
        job: what to train.
        transport: how workers and server meet.
        run_dir: where config, history, checkpoints and summary go; None keeps records in memory.
        config: settings to write to config.json.
        sinks: further receivers of every record.
        saver: how many checkpoints are kept (one is made after every epoch).
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        *,
        run_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        saver: Saver | None = None,
    ) -> None:
        self._job, self._transport = job, transport
        self._flat, self._device = FlatWeights(job.model), next(job.model.parameters()).device
        self._record = Recorder(run_dir, sinks)
        self._config = dict(config or {})
        self._saver = saver or Saver(Checkpoints())
        self._stopwatch = Stopwatch(self._device)
        self._counters = self._saved = _Counters()
        self._stop_requested = False

    def fit(self) -> History:
        """Train for all epochs and return the records.

        Raises:
            HessianFlowError: the run directory is in use or cannot be written; the loss stopped
                being finite.
        """
        self._record.start(self._config)
        try:
            self._save(None)
        except HessianFlowError:
            self._record.close()
            raise
        return self._run(None)

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run of the same settings; simulated on a CPU, it ends bit for bit
        as if it never had.

        Raises:
            HessianFlowError: no usable checkpoint there, or one of another model.
        """
        folder = in_home(run_dir)
        try:
            snapshot, warning = self._restore(folder)
        except HessianFlowError:
            self._record.close()
            raise
        if warning is not None:
            self._event("fallback", warning)
        return self._run(snapshot)

    def request_stop(self) -> None:
        """Ask the run to save a checkpoint and return after the push it waits for (safe in a signal
        handler)."""
        self._stop_requested = True

    @property
    def progress(self) -> Progress:
        """How far the run has come; an epoch is complete with as many pushes as there are
        workers."""
        job, counters = self._job, self._counters
        epoch = counters.commits // job.workers
        return Progress(epoch, counters.examples, counters.updates, job.examples, job.epochs)

    def _restore(self, folder: Path) -> tuple[Snapshot | None, str | None]:
        """Put back the newest checkpoint; returns the server's part of it, and a warning where it
        is not the last."""
        self._record.hold(folder)
        kept, source = folder / CHECKPOINTS, f"the checkpoint in {folder}"
        state, _, warning = checkpoints.load_newest(kept, history_length(folder), self._check)
        with restoring(source):
            checkpoint.load_model(self._job.model, state["model"], source)
            checkpoint.restore_generators(state["generators"])
            self._counters = self._saved = _Counters(**state["counters"])
            self._stopwatch.load(state["seconds"])
            snapshot = with_arrays(state["dual_batch"])
        self._record.reopen(folder, state["history_bytes"])
        if warning is not None:
            checkpoints.set_aside(kept)
        return snapshot, warning

    def _check(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that is damaged, or of another model."""
        check_dual_batch_state(state)
        fault = model_fault(self._job.model, state["model"])
        if fault is not None:
            raise HessianFlowError(f"it is of another model: {fault}")
        check_finite(self._job.model, state["model"])
        for weights in _copies_of_weights(state["dual_batch"] or {}):
            self._flat.check(weights)

    def _run(self, resume_from: Snapshot | None) -> History:
        listener = Listener(
            self._on_commit, self._on_snapshot, self._on_event, lambda: self._stop_requested
        )
        try:
            self._transport(self._job.epochs * self._job.workers, listener, resume_from)
            found = summary_of(
                self._record.history(),
                self.progress,
                self._decision(),
                self._seconds(),
                self._device,
            )
            clock = {
                "clock_seconds": self._counters.clock,
                "predicted_seconds": self._counters.predicted,
            }
            self._record.finish({**found, **clock})
        finally:
            self._record.close()
        return self._record.history()

    def _on_commit(self, commit: Commit) -> None:
        figures = commit.figures
        self._counters = c = replace(
            self._counters, commits=self._counters.commits + 1, clock=commit.finished
        )
        c.examples += int(figures["examples"])
        c.updates += int(figures["steps"])
        c.training_seconds += figures["seconds"]
        if figures["weight"] > 0:
            c.loss += figures["loss"] * figures["weight"]
        c.weight += figures["weight"]
        c.correct += int(figures["correct"])
        c.counted += figures["counted"]
        c.trained += int(figures["examples"])
        stage, _ = self._job.stage_at(commit.epoch)
        self._record.write(
            {
                **self._place("commit"),
                **{
                    name: getattr(commit, name)
                    for name in ("worker", "started", "finished", "staleness")
                },
                "rate_epoch": commit.epoch,
                "resolution": stage.level.resolution,
                **{name: figures[name] for name in ("batch_size", "steps", "loss", "seconds")},
            }
        )
        if figures["weight"] > 0 and not math.isfinite(figures["loss"]):
            where = (
                f"the training loss of worker {commit.worker} was not finite in epoch"
                f" {commit.epoch + 1}"
            )
            self._event("diverged", where)
            raise DivergenceError(f"{where}: lower the rate; {self._record.last_checkpoint()}")

    def _on_snapshot(self, state: Snapshot) -> None:
        self._flat.write(state["server"]["weights"])
        with self._stopwatch.section("evaluation"):
            self._job.recalibrate()
        if self._counters.commits % self._job.workers == 0:
            self._finish_epoch()
        if self._stop_requested and self.progress.epoch < self._job.epochs:
            self._event(
                "preempted",
                "stopped on request before the last epoch; `hessianflow resume` continues",
            )
        self._save(state)

    def _on_event(self, text: str, commits: int) -> None:
        """A worker or the server failed; where commits are to be made again, count from the last
        snapshot."""
        if commits < self._counters.commits:
            self._counters = replace(self._saved)
        self._event("restart", text)

    def _finish_epoch(self) -> None:
        with self._stopwatch.section("evaluation"):
            evaluation = evaluate(self._job.model, self._job.eval_data, self._job.loss_fn)
        c, epoch = self._counters, self.progress.epoch - 1
        stage, plan = self._job.stage_at(epoch)
        c.predicted += plan.target_seconds
        total = self._seconds()
        spent = {name: value - c.seconds.get(name, 0.0) for name, value in total.items()}
        small = plan.small
        self._record.write(
            {
                **self._place("epoch"),
                "batch_size": self._decision().batch_size,
                "small_batch_size": None if small is None else small.batch_size,
                "resolution": stage.level.resolution,
                "lr": self._job.rate_at(epoch),
                "adversarial_share": 0.0,
                "train_loss": c.loss / c.weight if c.weight else math.nan,
                "train_accuracy": c.correct / c.counted if c.counted else None,
                "eval_loss": evaluation.loss,
                "eval_accuracy": evaluation.accuracy,
                "clock_seconds": c.clock,
                "predicted_seconds": c.predicted,
                **rows.spent_on(spent, c.trained),
            }
        )
        improved = evaluation.accuracy is not None and (
            c.best is None or evaluation.accuracy > c.best
        )
        best = evaluation.accuracy if improved else c.best
        self._counters = replace(
            c, best=best, loss=0.0, weight=0.0, correct=0, counted=0.0, trained=0, seconds=total
        )
        if improved:
            self._save(None, BEST)

    def _decision(self) -> Decision:
        """Return the largest batch of the epoch last completed (or of the first), for the
        records."""
        _, plan = self._job.stage_at(max(0, self.progress.epoch - 1))
        return Decision(max(worker.batch_size for worker in plan.workers))

    def _seconds(self) -> dict[str, float]:
        return {**self._stopwatch.totals(), "training": self._counters.training_seconds}

    def _place(self, kind: str) -> dict[str, Any]:
        return {**rows.place(kind, self.progress), "commits": self._counters.commits}

    def _event(self, event: str, message: str) -> None:
        self._record.write(rows.event_row(self.progress, event, message))

    def _save(self, state: Snapshot | None, name: str = LAST) -> None:
        self._saved = replace(self._counters)
        if self._record.run_dir is None:
            return
        with self._stopwatch.section("checkpoint"):
            saved = {
                "model": self._job.model.state_dict(),
                "dual_batch": checkpoint.plain(checkable(state)),
                "generators": checkpoint.generator_states(),
                "counters": asdict(self._counters),
                "examples": self._counters.examples,
                "updates": self._counters.updates,
                "seconds": self._stopwatch.totals(),
                "history_bytes": self._record.sync(),
            }
            self._saver.save(self._record.run_dir, saved, name)


def _copies_of_weights(snapshot: Snapshot) -> Iterator[Tensor]:
    """Yield the weights of the server, those pushed into an open round, and those that workers
    train from."""
    if "server" in snapshot:
        yield snapshot["server"]["weights"]
        yield from (pushed for _, pushed in snapshot["server"]["round"].values())
    yield from (weights for _, _, weights in snapshot.get("running", {}).values())
