"""The end of an epoch: statistics, evaluation, row, measurements, schedule, best model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hessianflow.interfaces import Batch
from hessianflow.normalisation.settle import NormStatistics, settle
from hessianflow.runs import rows
from hessianflow.runs.names import BEST
from hessianflow.training.course import Done
from hessianflow.training.evaluate import evaluate
from hessianflow.training.keeping import Keeper
from hessianflow.training.optimizers import set_mode
from hessianflow.training.task import AfterEpoch


@dataclass
class EpochEnd:
    """Ends an epoch; after an error, a second call continues behind what was done."""

    settings: AfterEpoch
    norm_statistics: NormStatistics
    keeper: Keeper

    def __post_init__(self) -> None:
        steering = self.keeper.steering
        self.task = steering.step.task
        self.microbatch = steering.step.microbatch
        self.course = steering.course
        self.totals = steering.totals
        self.rate = steering.rate
        self.reporter = steering.reporter
        self.stopwatch = steering.stopwatch
        self.world = steering.world

    def settle_statistics(self, batch: Batch | None, done: Done) -> None:
        """Measure running statistics again where they have not settled, before any evaluation."""
        if done.remeasured is not None:
            return
        # After a resume there is no batch to measure them on.
        if batch is None or self.norm_statistics == "running":
            done.remeasured = False
            return
        task = self.task
        size = self.microbatch.size
        with self.stopwatch.section("evaluation"):
            mean = self.totals.mean_so_far()
            message = settle(task.model, batch, task.loss_fn, mean, size, self.world)
        if message:
            self.reporter.say_once("statistics", message)
        done.remeasured = bool(message)

    def __call__(self, done: Done) -> None:
        """Evaluate, record, measure, step the schedule and save the model if it is the best."""
        with self._in_use():
            if done.row is None:
                self._evaluate(done)
            self._measure(done)
            if not done.stepped:
                done.stepped = True
                self._start_next(done)
            if done.evaluation is None and self.settings.best.figure is None:
                return
            self._judge({**(done.row or {}), **done.figures})

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Put the weights that are to be used in place of the trained ones while active."""
        before = self.settings.before_evaluation
        after = self.settings.after_evaluation
        try:
            with self.stopwatch.section("evaluation"):
                set_mode(self.task.optimizer, training=False)
                if before is not None:
                    before()
            yield
        finally:
            with self.stopwatch.section("evaluation"):
                if after is not None:
                    after()
                set_mode(self.task.optimizer, training=True)

    def _evaluate(self, done: Done) -> None:
        task = self.task
        data = task.eval_data
        if data is not None:
            with self.stopwatch.section("evaluation"):
                done.evaluation = evaluate(task.model, data, task.loss_fn, reducer=self.world)
        seconds = self.stopwatch.totals()
        done.row = self.totals.epoch_row(self.course.progress, done.evaluation, seconds)
        if done.remeasured:
            done.row["statistics"] = "remeasured"
        self.reporter.record.write(done.row)

    def _measure(self, done: Done) -> None:
        for measurement in self.settings.measurements[done.measurements :]:
            with self.stopwatch.section("evaluation"):
                figures, warning = measurement()
            done.measurements += 1
            done.figures |= figures
            row = rows.measurement_row(self.course.progress, measurement.kind, figures)
            self.reporter.record.write(row)
            if warning:
                self.reporter.event("alarm", warning)

    def _judge(self, figures: Mapping[str, Any]) -> None:
        """Save the model if it is the best, and end the run if none was better for too long."""
        counters = self.course.counters
        best = self.settings.best
        if best.judge(counters, figures):
            self.keeper.save(BEST)
        elif best.is_exhausted(counters) and not self.course.is_over:
            counters.ended_early = True
            message = f"no improvement in {counters.waited} epochs: the run ends early"
            self.reporter.event("ended early", message)

    def _start_next(self, done: Done) -> None:
        assert done.row is not None
        self.totals.start_epoch(self.stopwatch.totals())
        loss = done.row["train_loss"]
        if done.evaluation is not None:
            loss = done.evaluation.loss
        self.rate.end_epoch(loss, done.row["eval_accuracy"])
