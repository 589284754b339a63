"""The end of an epoch: statistics, evaluation, row, measurements, schedule, best model."""

from dataclasses import dataclass

from hessianflow.interfaces import Batch
from hessianflow.normalisation.settle import NormStatistics, settle
from hessianflow.runs import rows
from hessianflow.runs.names import BEST
from hessianflow.training.after_epoch import Evaluator
from hessianflow.training.course import Done
from hessianflow.training.keeping import Keeper
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.microbatch import MicrobatchSize
from hessianflow.training.reporting import Reporter
from hessianflow.training.totals import RunningTotals


@dataclass
class EpochEnd:
    """Ends an epoch; after an error, a second call continues behind what was done."""

    evaluator: Evaluator
    totals: RunningTotals
    rate: LearningRate
    keeper: Keeper
    reporter: Reporter
    microbatch: MicrobatchSize
    norm_statistics: NormStatistics

    def settle_statistics(self, batch: Batch | None, done: Done) -> None:
        """Measure running statistics again where they have not settled.

        This comes before any reading or evaluation. After a resume there is no `batch` to measure
        them on, and nothing is done.
        """
        if done.remeasured is not None:
            return
        if batch is None or self.norm_statistics == "running":
            done.remeasured = False
            return
        evaluator = self.evaluator
        with evaluator.stopwatch.section("evaluation"):
            message = settle(
                evaluator.model,
                batch,
                evaluator.loss_fn,
                self.totals.mean_so_far(),
                self.microbatch.size,
                evaluator.world,
            )
        if message:
            self.reporter.say_once("statistics", message)
        done.remeasured = bool(message)

    def __call__(self, done: Done) -> None:
        """Evaluate, record, measure, step the schedule and save the model if it is the best."""
        course = self.keeper.course
        with self.evaluator.in_use():
            if done.row is None:
                self._evaluate(done)
            self._measure(done)
            if not done.stepped:
                done.stepped = True
                self._start_next(done)
            if done.evaluation is None:
                return
            if course.counters.is_best(done.evaluation.accuracy, done.evaluation.loss):
                self.keeper.save(BEST)

    def _evaluate(self, done: Done) -> None:
        done.evaluation = self.evaluator.evaluate()
        seconds = self.evaluator.stopwatch.totals()
        done.row = self.totals.epoch_row(self.keeper.course.progress, done.evaluation, seconds)
        if done.remeasured:
            done.row["statistics"] = "remeasured"
        self.reporter.record.write(done.row)

    def _measure(self, done: Done) -> None:
        for kind, figures, warning in self.evaluator.measure(done.measurements):
            done.measurements += 1
            progress = self.keeper.course.progress
            self.reporter.record.write(rows.measurement_row(progress, kind, figures))
            if warning:
                self.reporter.event("alarm", warning)

    def _start_next(self, done: Done) -> None:
        assert done.row is not None
        self.totals.start_epoch(self.evaluator.stopwatch.totals())
        loss = done.row["train_loss"]
        if done.evaluation is not None:
            loss = done.evaluation.loss
        self.rate.end_epoch(loss, done.row["eval_accuracy"])
