"""The training loop: what happens from the first batch to the last, in order.

    for each batch, drawn and attacked ahead:
        take one optimizer step at the rate in force, and count it
        where a checkpoint or an epoch is due, look for a divergence
        at the end of an epoch, settle the statistics of batch normalisation
        measure, ask the controller, and apply its decision to the next batch drawn
        at the end of an epoch, evaluate, measure and step the schedule
        save where a checkpoint is due

Each line is a part with a file of its own; this file holds only their order.

On several ranks every rank runs this loop on its part of every batch. The ranks agree through the
world on what depends on a clock, a signal or one rank's numbers before any of them acts on it; only
rank 0 writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from hessianflow.interfaces import Batch, Decision, Wishes, World
from hessianflow.normalisation.ghost import ghost_normalisation
from hessianflow.training.course import Course
from hessianflow.training.divergence import DivergenceError
from hessianflow.training.epoch_end import EpochEnd
from hessianflow.training.extent import Position
from hessianflow.training.keeping import Keeper
from hessianflow.training.learning_rate import SET_BY_HAND, LearningRate
from hessianflow.training.lookahead import Lookahead, Planned
from hessianflow.training.optimizers import set_mode
from hessianflow.training.reporting import Reporter
from hessianflow.training.rollback import Guard
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep
from hessianflow.training.totals import RunningTotals

PREEMPTED = "stopped on request before the last epoch; `hessianflow resume` continues"
"""The message recorded when a run was asked to stop."""


@dataclass
class TrainingLoop:
    """The parts of a run, in the order in which they act; each class says what it does.

    Attributes:
        norm_batch_size: examples that batch normalisation sees at once; None: the microbatch.
        stop_requested: set from anywhere on any rank; all ranks stop after the current step.
    """

    model: nn.Module
    norm_batch_size: int | None
    course: Course
    ahead: Lookahead
    rate: LearningRate
    step: TrainingStep
    totals: RunningTotals
    guard: Guard
    steering: Steering
    epoch_end: EpochEnd
    keeper: Keeper
    reporter: Reporter
    world: World
    stop_requested: bool = field(default=False, init=False)

    def run_until(self, updates: int | None = None) -> None:
        """Train until the run has made `updates` updates, or to its end; leave the records open."""
        with self._training():
            while self.course.is_unfinished and not self._has_reached(updates):
                # A model in training mode is left alone: layers that the user froze stay so.
                if not self.model.training:
                    self.model.train()
                try:
                    self._train(updates)
                except DivergenceError as error:
                    self.guard.roll_back(error)

    def _train(self, updates: int | None) -> None:
        """Take steps to the end of the run, to `updates` updates, or to a stop."""
        # An error on this or another rank may have come between an update and what follows it.
        if not self.course.is_settled and self._follow_up(None, Wishes()):
            return
        batch: Batch | None = None
        for planned in self.ahead.plan(self._now):
            if planned is None:  # The previous batch ended a pass over the data.
                if not self.course.end_pass():
                    continue
                wishes = Wishes()
            else:
                batch = planned[0].batch
                wishes = self._take_step(*planned)
            if self._follow_up(batch, wishes) or self.course.counters.updates == updates:
                return

    def _take_step(self, now: Planned, ahead: Planned | None) -> Wishes:
        """Take one optimizer step, count it, and return what a signal or clock asks of any rank."""
        with self.rate.in_force(now.decision.lr_factor):
            result = self.step(now, ahead)
        self.ahead.trained()
        self.course.count(result.examples, data_ended=now.data_ended)
        share = self.steering.share(now.decision)
        self.totals.add(result, self.course.counters.updates, now.decision, self.rate.value, share)
        self.rate.advance(result.examples)
        self._tell()
        wishes = self.world.agreed
        if wishes.show:
            self._show()
        return wishes

    def _follow_up(self, batch: Batch | None, wishes: Wishes) -> bool:
        """Do what follows an update on `batch`, and return whether to stop then.

        After an error in any of this, the next call continues where this one failed.
        """
        counters = self.course.counters
        at_end = self.course.is_between_epochs
        stop = wishes.stop
        self.stop_requested |= stop
        # Buffers are averaged, and losses read, only where a checkpoint or an epoch needs them.
        saves = at_end or stop or wishes.save or self.keeper.saver.is_due(counters)
        if saves:
            self.guard.check(at_end=at_end)
            self.world.average_buffers()
        done = self.course.done()
        if at_end:
            self.epoch_end.settle_statistics(batch, done)
        self.steering.decide(at_end, done)
        self.reporter.write_all(done.rows)
        if at_end:
            self.epoch_end(done)
            # A sink or a measurement may ask to stop on the weights of the epoch that has ended.
            stop = stop or any(self.world.gather(self.stop_requested))
        self.course.settle()
        if stop and self.course.is_unfinished:
            self.reporter.event("preempted", PREEMPTED)
        # While losses are in doubt, the previous checkpoint is kept: a rollback may need it.
        if saves and (stop or not self.course.is_unfinished or not self.totals.in_doubt):
            self.keeper.save()
        return stop or self.course.is_over

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Keep model and optimizer in training mode, and the progress bar shown, while active."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.guard.begin()
        self.reporter.begin()
        self.world.post(self._wishes)
        try:
            set_mode(self.step.optimizer, training=True)
            with ghost_normalisation(self.model, self.norm_batch_size):
                yield
        finally:
            self.reporter.end()
            self.world.post(Wishes)
            self.stop_requested = False
            for module, training in modes:
                module.training = training

    def _has_reached(self, updates: int | None) -> bool:
        """Return whether to stop training: on request, or because `updates` updates were made."""
        if any(self.world.gather(self.stop_requested)):
            self.stop_requested = True
        is_there = updates is not None and self.course.counters.updates >= updates
        return self.stop_requested or (is_there and self.course.is_settled)

    def _wishes(self) -> Wishes:
        """Return what a signal or a clock asks of this rank at the end of a step."""
        return Wishes(self.stop_requested, self.keeper.saver.time_is_up, self.reporter.bar.is_due)

    def _now(self) -> tuple[Position, Decision]:
        """Return how far the run has come and the decision in force, for the next draw."""
        return self.course.counters.position, self.steering.decision

    def _tell(self) -> None:
        """Record what the user changed between this step and the previous one."""
        if self.step.news:
            self.reporter.event("parameters", self.step.news)
            self.step.news = ""
        if self.rate.set_by_hand:
            self.reporter.say_once("rate", SET_BY_HAND)
            self.rate.set_by_hand = False

    def _show(self) -> None:
        """Show the figures of the epoch so far."""
        # All ranks wait for their device here, but only when the bar is due.
        self.guard.check_losses()
        loss, accuracy = self.totals.means()
        self.reporter.show(
            batch=self.steering.decision.batch_size,
            lr=self.rate.value,
            loss=loss,
            acc=accuracy,
            eig=self.steering.last_eigenvalue,
        )
