"""A run on a parameter server, which writes the same files as any other run.

Its own kind of row is `commit`, one for each push (worker, start and end on the server's clock,
staleness, batch size, loss). Rows of an epoch also hold `clock_seconds` (the server's clock, which
is that of the time model in a simulation and wall time on Ray), `predicted_seconds` (the sum of the
plans' target times), resolution and small batch size.
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
class DualBatchTask:
    """The model, data and plan of a run.

    Attributes:
        model: Model into which the server's weights are copied to evaluate and save them.
        eval_data, loss_fn: Data and loss of the evaluation after every epoch.
        recalibrate: Function that measures the model's statistics of normalisation at full
            resolution.
        stage_at, rate_at: Functions that return the stage and the plan, and the learning rate, of
            an epoch.
        workers: Number of workers.
        epochs: Passes over the training data, each with as many pushes as there are workers.
        examples: Number of training examples.
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
    """Counts of the whole run and, from `loss` on, of the current epoch."""

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
    """Trainer that runs a :class:`DualBatchTask` on a transport.

    Args:
        task: Model, data and plan of the run.
        transport: Transport that runs the workers against the server.
        run_dir: Folder of config, history, checkpoints and summary; None keeps records in memory.
        config: Settings to write to config.json.
        sinks: Further receivers of every record.
        saver: Saver, which says how many checkpoints are kept (one is made after every epoch).
    """

    def __init__(
        self,
        task: DualBatchTask,
        transport: Transport,
        *,
        run_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        saver: Saver | None = None,
    ) -> None:
        self._task = task
        self._transport = transport
        self._flat = FlatWeights(task.model)
        self._device = next(task.model.parameters()).device
        self._record = Recorder(run_dir, sinks)
        self._config = dict(config or {})
        self._saver = saver or Saver(Checkpoints())
        self._stopwatch = Stopwatch(self._device)
        self._counters = self._saved = _Counters()
        self._stop_requested = False

    def fit(self) -> History:
        """Train for all epochs and return the records.

        Raises:
            HessianFlowError: The run directory cannot be used, or the loss is no longer finite.
        """
        self._record.start(self._config)
        try:
            self._save(None)
        except HessianFlowError:
            self._record.close()
            raise
        return self._run(None)

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run of the same settings.

        A simulation on a CPU ends bit for bit as if it had not been interrupted.

        Raises:
            HessianFlowError: The directory has no usable checkpoint, or one of another model.
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
        """Make the run save a checkpoint and end after the next push (safe in a signal handler)."""
        self._stop_requested = True

    @property
    def progress(self) -> Progress:
        """Return the progress of the run; an epoch has as many pushes as there are workers."""
        task = self._task
        counters = self._counters
        epoch = counters.commits // task.workers
        return Progress(epoch, counters.examples, counters.updates, task.examples, task.epochs)

    def _restore(self, folder: Path) -> tuple[Snapshot | None, str | None]:
        """Restore the newest usable checkpoint; return its snapshot, and a warning if it is old."""
        self._record.hold(folder)
        kept = folder / CHECKPOINTS
        source = f"the checkpoint in {folder}"
        state, _, warning = checkpoints.load_newest(kept, history_length(folder), self._check)
        with restoring(source):
            checkpoint.load_model(self._task.model, state["model"], source)
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
        fault = model_fault(self._task.model, state["model"])
        if fault is not None:
            raise HessianFlowError(f"it is of another model: {fault}")
        check_finite(self._task.model, state["model"])
        for weights in _copies_of_weights(state["dual_batch"] or {}):
            self._flat.check(weights)

    def _run(self, resume_from: Snapshot | None) -> History:
        listener = Listener(
            self._on_commit, self._on_snapshot, self._on_event, lambda: self._stop_requested
        )
        try:
            self._transport(self._task.epochs * self._task.workers, listener, resume_from)
            state = (self.progress, self._decision(), self._seconds())
            summary = summary_of(self._record.history(), *state, self._device)
            summary["clock_seconds"] = self._counters.clock
            summary["predicted_seconds"] = self._counters.predicted
            self._record.finish(summary)
        finally:
            self._record.close()
        return self._record.history()

    def _on_commit(self, commit: Commit) -> None:
        figures = commit.figures
        self._counters = c = replace(self._counters)
        c.commits += 1
        c.clock = commit.finished
        c.examples += int(figures["examples"])
        c.updates += int(figures["steps"])
        c.training_seconds += figures["seconds"]
        if figures["weight"] > 0:
            c.loss += figures["loss"] * figures["weight"]
        c.weight += figures["weight"]
        c.correct += int(figures["correct"])
        c.counted += figures["counted"]
        c.trained += int(figures["examples"])
        stage, _ = self._task.stage_at(commit.epoch)
        self._record.write(
            {
                **self._header("commit"),
                "worker": commit.worker,
                "started": commit.started,
                "finished": commit.finished,
                "staleness": commit.staleness,
                "rate_epoch": commit.epoch,
                "resolution": stage.level.resolution,
                **{name: figures[name] for name in ("batch_size", "steps", "loss", "seconds")},
            }
        )
        if figures["weight"] > 0 and not math.isfinite(figures["loss"]):
            where = f"worker {commit.worker} was not finite in epoch {commit.epoch + 1}"
            message = f"the training loss of {where}"
            self._event("diverged", message)
            raise DivergenceError(f"{message}: lower the rate; {self._record.last_checkpoint()}")

    def _on_snapshot(self, state: Snapshot) -> None:
        self._flat.write(state["server"]["weights"])
        with self._stopwatch.section("evaluation"):
            self._task.recalibrate()
        if self._counters.commits % self._task.workers == 0:
            self._finish_epoch()
        if self._stop_requested and self.progress.epoch < self._task.epochs:
            way_on = "`hessianflow resume` continues"
            self._event("preempted", f"stopped on request before the last epoch; {way_on}")
        self._save(state)

    def _on_event(self, text: str, commits: int) -> None:
        """Record a failure; if commits were lost, count again from the last snapshot."""
        if commits < self._counters.commits:
            self._counters = replace(self._saved)
        self._event("restart", text)

    def _finish_epoch(self) -> None:
        with self._stopwatch.section("evaluation"):
            evaluation = evaluate(self._task.model, self._task.eval_data, self._task.loss_fn)
        c = self._counters
        epoch = self.progress.epoch - 1
        stage, plan = self._task.stage_at(epoch)
        c.predicted += plan.target_seconds
        total = self._seconds()
        spent = {name: value - c.seconds.get(name, 0.0) for name, value in total.items()}
        small_batch_size = plan.small.batch_size if plan.small is not None else None
        self._record.write(
            {
                **self._header("epoch"),
                "batch_size": self._decision().batch_size,
                "small_batch_size": small_batch_size,
                "resolution": stage.level.resolution,
                "lr": self._task.rate_at(epoch),
                "adversarial_share": 0.0,
                "train_loss": _ratio(c.loss, c.weight),
                "train_accuracy": _ratio(c.correct, c.counted),
                "eval_loss": evaluation.loss,
                "eval_accuracy": evaluation.accuracy,
                "clock_seconds": c.clock,
                "predicted_seconds": c.predicted,
                **rows.spent_on(spent, c.trained),
            }
        )
        best = c.best
        improved = evaluation.accuracy is not None and (best is None or evaluation.accuracy > best)
        if improved:
            best = evaluation.accuracy
        self._counters = replace(
            c, best=best, loss=0.0, weight=0.0, correct=0, counted=0.0, trained=0, seconds=total
        )
        if improved:
            self._save(None, BEST)

    def _decision(self) -> Decision:
        """Return the largest batch of the last completed epoch, or of the first, for records."""
        _, plan = self._task.stage_at(max(0, self.progress.epoch - 1))
        return Decision(max(worker.batch_size for worker in plan.workers))

    def _seconds(self) -> dict[str, float]:
        return {**self._stopwatch.totals(), "training": self._counters.training_seconds}

    def _header(self, kind: str) -> dict[str, Any]:
        return {**rows.place(kind, self.progress), "commits": self._counters.commits}

    def _event(self, event: str, message: str) -> None:
        self._record.write(rows.event_row(self.progress, event, message))

    def _save(self, state: Snapshot | None, name: str = LAST) -> None:
        self._saved = replace(self._counters)
        if self._record.run_dir is None:
            return
        with self._stopwatch.section("checkpoint"):
            saved = {
                "model": self._task.model.state_dict(),
                "dual_batch": checkpoint.plain(checkable(state)),
                "generators": checkpoint.generator_states(),
                "counters": asdict(self._counters),
                "examples": self._counters.examples,
                "updates": self._counters.updates,
                "seconds": self._stopwatch.totals(),
                "history_bytes": self._record.sync(),
            }
            self._saver.save(self._record.run_dir, saved, name)


def _ratio(total: float, divisor: float) -> float | None:
    return total / divisor if divisor else None


def _copies_of_weights(snapshot: Snapshot) -> Iterator[Tensor]:
    """Yield the weights of the server, those in an open round, and those that workers train."""
    if "server" in snapshot:
        yield snapshot["server"]["weights"]
        yield from (pushed for _, pushed in snapshot["server"]["round"].values())
    yield from (weights for _, _, weights in snapshot.get("running", {}).values())
