"""What happens from the first batch to the last: steps, decisions, evaluation, checkpoints, and
what goes wrong.

On several ranks every rank runs this loop on its part of every batch. What depends on a clock, a
signal or one rank's numbers is agreed on through the world before anybody acts on it; rank 0 alone
writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hessianflow.interfaces import Batch, Decision, Progress, ResizableBatches, World
from hessianflow.normalisation.ghost import ghost_normalisation
from hessianflow.normalisation.settle import NormStatistics, settle
from hessianflow.runs import Recorder, rows
from hessianflow.runs.names import BEST, LAST
from hessianflow.runs.rows import Record
from hessianflow.training import checkpoint
from hessianflow.training.after_epoch import AfterEpoch
from hessianflow.training.control_point import ControlPoint
from hessianflow.training.divergence import (
    DivergenceError,
    DivergencePolicy,
    DivergenceWatch,
    hold,
    rate_rule,
)
from hessianflow.training.evaluate import Evaluation
from hessianflow.training.learning_rate import SET_BY_HAND, LearningRate
from hessianflow.training.lookahead import Lookahead, Planned
from hessianflow.training.optimizers import set_mode
from hessianflow.training.progress import ProgressBar
from hessianflow.training.restore import restore_newest
from hessianflow.training.saving import Saver
from hessianflow.training.schedule import ScheduleUnit
from hessianflow.training.state import RunState
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals
from hessianflow.training.world import on_first_rank

OVER_BUDGET = (
    "a reading was left out: it would have exceeded the curvature budget, a share of the training"
    " so far; more will be (--curvature-budget raises it, 100 reads after every epoch)"
)
"""Said once a run: a trajectory with gaps should not be a riddle."""


@dataclass
class _Done:
    """What was done after an update; after an error there, the next :meth:`Run.fit` goes on behind
    it.

    Attributes:
        place: updates made and epochs completed; that an epoch is over may be told after its last
            update.
        decided: whether the controller has been asked.
        remeasured: whether running statistics were, before that; None: nobody has looked yet.
        rows: of what was measured and decided, those that are not written yet.
        evaluation: at the end of an epoch; None where there is none.
        row: of the epoch.
        measurements: how many of them were made.
        stepped: whether the schedule has been told that the epoch is over.
    """

    place: tuple[int, int]
    decided: bool = False
    remeasured: bool | None = None
    rows: list[Record] = field(default_factory=list)
    evaluation: Evaluation | None = None
    row: dict[str, Any] | None = None
    measurements: int = 0
    stepped: bool = False


@dataclass
class TrainingLoop:
    """The parts of a run, put together by the trainer, and the order in which they act.

    Attributes:
        model: in training mode while it runs.
        train_data: batches of changing size.
        ahead: the queue between data and step.
        after_epoch: evaluates and measures.
        epochs: passes over the training data.
        schedule_unit: see :class:`LearningRate`.
        reference_batch_size: examples that count as one step of a schedule in reference batches.
        norm_batch_size: examples that batch normalisation sees at once; None: the microbatch.
        step: takes one optimizer step.
        control: measures and asks the controller.
        totals: of the epoch under way.
        rate: learning rate.
        state: everything a checkpoint holds.
        record: what the run leaves behind; rank 0's alone has a folder and sinks.
        saver: knows when to save, and how.
        policy: what to do after a divergence.
        watch: seconds by part.
        world: the ranks that train together.
        decision: in force.
        run_dir: folder of the run, on all ranks; None: nothing is written.
        show_progress: see :class:`ProgressBar`.
        stop_requested: set from anywhere on any rank; all stop after the step under way.
    """

    model: nn.Module
    train_data: ResizableBatches
    ahead: Lookahead
    after_epoch: AfterEpoch
    epochs: int
    schedule_unit: ScheduleUnit
    reference_batch_size: int
    norm_batch_size: int | None
    step: TrainingStep
    control: ControlPoint
    totals: RunningTotals
    rate: LearningRate
    state: RunState
    record: Recorder
    saver: Saver
    policy: DivergencePolicy
    watch: Stopwatch
    world: World
    decision: Decision
    run_dir: Path | None
    show_progress: bool | None
    norm_statistics: NormStatistics = "settled"
    stop_requested: bool = field(default=False, init=False)
    _done: "_Done | None" = field(default=None, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        per_epoch, counters = self.train_data.num_examples, self.state.counters
        return Progress(counters.epoch, counters.examples, counters.updates, per_epoch, self.epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a run needs to continue as if it had never stopped: tensors and plain
        values."""
        return self.state.capture(self.decision, self.record.sync())

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Continue from :meth:`state_dict`; `source` names it in errors."""
        self.forget_plans()
        self.apply(self.state.restore(state, source, self.world.rank))

    def forget_plans(self) -> None:
        """Forget what was drawn ahead, and what was done after the last update: the state or the
        world is another."""
        self.ahead.forget()
        self._done = None

    def run_until(self, updates: int | None = None) -> None:
        """Train until so many updates have been made in all, or to the end; the records stay open
        for more.

        Raises:
            DivergenceError: the loss stopped being finite.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self._watcher = DivergenceWatch(
            lambda: self.step.trained.current, self.model, self.totals, self.world
        )
        total = self.epochs * self.train_data.num_examples
        self._bar = ProgressBar(total, self.state.counters.examples, show=self.show_progress)
        try:
            set_mode(self.step.optimizer, training=True)
            with ghost_normalisation(self.model, self.norm_batch_size):
                while self.is_unfinished and not self._reached(updates):
                    # in training mode already: layers that the user froze stay as they are
                    if not self.model.training:
                        self.model.train()
                    try:
                        self._train(updates)
                    except DivergenceError as error:
                        self._roll_back(error)
        finally:
            self._bar.close()
            self.stop_requested = False
            for module, training in modes:
                module.training = training

    @property
    def is_unfinished(self) -> bool:
        """Whether anything of the run is still to be done."""
        counters = self.state.counters
        return counters.epoch < self.epochs or counters.settled < counters.updates

    def _reached(self, updates: int | None) -> bool:
        if any(self.world.gather(self.stop_requested)):
            self.stop_requested = True
        counters = self.state.counters
        settled = counters.settled == counters.updates
        return self.stop_requested or (
            updates is not None and settled and counters.updates >= updates
        )

    def _train(self, updates: int | None) -> None:
        """Take the steps from here to the end of the run, to `updates` updates, or to a stop."""
        counters = self.state.counters
        if counters.settled < counters.updates and self._settle(None, stop=False, save=False):
            # another rank, or the evaluation, had failed between an update and what follows it
            return
        batch: Batch | None = None
        for planned in self.ahead.plan(lambda: (self.progress, counters.place, self.decision)):
            stop = save = False
            if planned is None:  # the data ended the epoch with the batch before
                self._count_epoch()
            else:
                batch = planned[0].batch
                stop, save = self._take_step(*planned)
            if self._settle(batch, stop=stop, save=save) or counters.updates == updates:
                return

    def _take_step(self, now: Planned, ahead: Planned | None) -> tuple[bool, bool]:
        """Take one optimizer step, count it, and return whether a signal or a clock asks to stop,
        and to save."""
        counters = self.state.counters
        with self.rate.in_force(now.decision.lr_factor):
            result = self.step(now, ahead, self._flags)
        self.ahead.trained()
        counters.examples += result.examples
        counters.place += result.examples
        counters.updates += 1
        if now.ends_epoch or counters.place >= self.train_data.num_examples:
            self._count_epoch()
        share = self.step.share(now.decision)
        self.totals.add(result, counters.updates, now.decision, self.rate.value, share)
        if self.schedule_unit == "reference_batch":
            self.rate.advance(result.examples / self.reference_batch_size)
        self._bar.advance(result.examples)
        self._tell()
        stop, save, show = result.flags
        if show:
            self._show()
        return stop, save or self.saver.is_due(counters.examples - counters.saved_at)

    def _count_epoch(self) -> None:
        self.state.counters.epoch += 1
        self.state.counters.place = 0

    def _tell(self) -> None:
        """Record what the step met that had changed since the one before."""
        if self.step.news:
            self.event("parameters", self.step.news)
            self.step.news = ""
        if self.rate.set_by_hand:
            self._say_once("rate", SET_BY_HAND)
            self.rate.set_by_hand = False

    def _flags(self) -> Sequence[bool]:
        """Return whether to stop, to save, to show figures: whatever a signal or a clock told this
        rank."""
        return self.stop_requested, self.saver.time_is_up, self._bar.is_due

    def _settle(self, batch: Batch | None, *, stop: bool, save: bool) -> bool:
        """Return what follows an update on `batch`: decide, evaluate, save; whether to stop
        then."""
        counters = self.state.counters
        self.stop_requested |= stop
        at_end = counters.place == 0
        save = save or stop or at_end
        if save:
            self._check(self._watcher.first_bad_update(counters.updates, at_end=at_end))
            self.world.average_buffers()
        place = counters.updates, counters.epoch
        if self._done is None or self._done.place != place:
            self._done = _Done(place)
        done = self._done
        if at_end and done.remeasured is None:
            done.remeasured = self._settle_statistics(batch)
        if not done.decided:
            self._decide(at_end, done)
        while done.rows:
            self.record.write(done.rows.pop(0))
        if at_end:
            self._finish_epoch(done)
            # Whoever heard of the end of the epoch may want to stop there: with the weights of that
            # epoch.
            stop = stop or any(self.world.gather(self.stop_requested))
        counters.settled = counters.updates
        if stop and self.is_unfinished:
            self.event(
                "preempted",
                "stopped on request before the last epoch; `hessianflow resume` continues",
            )
        # In doubt the checkpoint before is kept: it may be the one to go back to.
        if save and (stop or not self.is_unfinished or not self.totals.in_doubt):
            self.save()
        return stop

    def _settle_statistics(self, batch: Batch | None) -> bool:
        """Return whether running statistics had to be measured anew, before a reading or an
        evaluation rests on them.

        Without a batch, after a resume, nothing is done.
        """
        if batch is None or self.norm_statistics == "running":
            return False
        with self.watch.part("evaluation"):
            usual, size = self.totals.mean_so_far(), self.step.microbatch.size
            found = settle(self.model, batch, self.after_epoch.loss_fn, usual, size, self.world)
        if found:
            self._say_once("statistics", found)
        return bool(found)

    def _decide(self, at_end: bool, done: "_Done") -> None:
        progress, before = self.progress, self.decision
        figures = {
            "train_loss": self.totals.last_loss,
            "epoch_loss": lambda: self.totals.means()[0],
            "learning_rate": lambda: self.rate.value,
        }
        outcome = self.control(progress, at_end, figures)
        after = before if outcome.decision is None else self._held(outcome.decision)
        was, now = self._setting(before), self._setting(after)
        changed = now != was
        done.decided = True
        if changed:
            self.apply(after)
        if outcome.is_over_budget:
            self._say_once("budget", OVER_BUDGET)
        if outcome.signals:
            done.rows.append(rows.signals_row(progress, outcome.signals))
        if outcome.reading is not None:
            # Where the controller was not asked, its last reason belongs to an earlier reading.
            note = "" if changed or outcome.decision is None else after.reason
            done.rows.append(rows.reading_row(progress, outcome.reading, note))
        # A warm-up moves the rate at every step: its row can wait for the end of the epoch.
        if changed and (at_end or now[::2] != was[::2]):
            done.rows.append(rows.decision_row(progress, before, after, now[-1]))

    def _setting(self, decision: Decision) -> tuple[int, float, float]:
        """Return what `decision` comes to in this run: batch size, rate factor, share attacked."""
        return decision.batch_size, decision.lr_factor, self.step.share(decision)

    def apply(self, decision: Decision) -> None:
        """Train under `decision` from the very next batch on."""
        self.decision = decision = self._held(decision)
        if decision.batch_size != self.train_data.batch_size:
            self.train_data.set_batch_size(decision.batch_size)
        self.rate.factor = decision.lr_factor

    def _finish_epoch(self, done: "_Done") -> None:
        with self.after_epoch.in_use():
            if done.row is None:
                done.evaluation = self.after_epoch.evaluate()
                done.row = self.totals.epoch_row(
                    self.progress, done.evaluation, self.watch.totals()
                )
                if done.remeasured:
                    done.row["statistics"] = "remeasured"
                self.record.write(done.row)
            for kind, figures, warning in self.after_epoch.measure(done.measurements):
                done.measurements += 1
                self.record.write(rows.measurement_row(self.progress, kind, figures))
                if warning:
                    self.event("alarm", warning)
            evaluation = done.evaluation
            if not done.stepped:
                done.stepped = True
                self.totals.start_epoch(self.watch.totals())
                if self.schedule_unit == "epoch":
                    loss = done.row["train_loss"] if evaluation is None else evaluation.loss
                    self.rate.step(loss, done.row["eval_accuracy"])
            if evaluation is not None and self.state.counters.is_best(
                evaluation.accuracy, evaluation.loss
            ):
                self.save(BEST)

    def _show(self) -> None:
        # the figures leave the device here anyway, alike on all ranks
        self._check(self.totals.first_bad_update())
        loss, accuracy = self.totals.means()
        self._bar.show(
            f"epoch {min(self.progress.epoch + 1, self.epochs)}/{self.epochs}",
            batch=self.decision.batch_size,
            lr=self.rate.value,
            loss=loss,
            acc=accuracy,
            eig=None if self.control.last_reading is None else self.control.last_reading.eigenvalue,
        )

    def _check(self, update: int | None) -> None:
        """Refuse to go on when training diverged at `update`."""
        if update is None:
            return
        epoch = self.state.counters.epoch + (self.state.counters.place > 0)
        where = (
            f"the training loss or a weight was not finite, or exploded, in epoch {epoch} at update"
            f" {update}"
        )
        self.event("diverged", where)
        kept = self.world.broadcast(self.record.last_checkpoint())
        raise DivergenceError(
            f"{where} (learning rate {self.rate.value:g}, batch {self.decision.batch_size}): lower"
            " the rate or the largest batch, or, if the loss was finite and right, set"
            f" max_loss_ratio=None; {kept}"
        )

    def _roll_back(self, error: DivergenceError) -> None:
        """Go back to the last checkpoint with the last growth undone, or raise the error where that
        is not possible."""
        counters, history = self.state.counters, self.record.history()
        cap = self.world.broadcast(
            self.policy.cap(history.growths, counters.rollbacks, counters.batch_cap)
        )
        if cap is None:
            raise error
        power, factor = on_first_rank(self.world, lambda: rate_rule(history.of_kind("batch")))
        rollbacks, seconds = counters.rollbacks + 1, self.watch.totals()
        _, warning = self.restore_newest(self.record.sync)
        self.watch.load(seconds)  # the time is spent all the same
        self.totals.forget_divergence()
        if warning is not None:
            self.event("fallback", warning)
        counters = self.state.counters
        counters.rollbacks, counters.batch_cap = rollbacks, cap
        counters.cap_power, counters.cap_factor = power, factor
        self._bar.move_to(counters.examples)
        self.event(
            "rollback",
            f"back to {self.progress.examples} examples; batch held at {cap} from now on",
        )
        self.ahead.revise(self._held)
        held = self._held(self.decision)
        share = self.step.share(held)
        self.record.write(rows.decision_row(self.progress, self.decision, held, share))
        self.apply(held)

    def _held(self, decision: Decision) -> Decision:
        """Return the decision as far as it can be carried out: below the cap."""
        counters = self.state.counters
        return hold(decision, counters.batch_cap, counters.cap_power, counters.cap_factor)

    def restore_newest(self, history_bytes: Callable[[], int]) -> tuple[dict[str, Any], str | None]:
        """Put back the newest checkpoint that can be; returns it, and a warning where it is not the
        last."""
        assert self.run_dir is not None
        return restore_newest(
            self.world,
            self.run_dir,
            history_bytes,
            self.load_state_dict,
            self.model,
            self.state.optimizer,
        )

    def event(self, event: str, message: str) -> None:
        """Record that something happened."""
        self.record.write(rows.event_row(self.progress, event, message))

    def _say_once(self, event: str, message: str) -> None:
        if event not in self._said and not self.record.has_event(event):
            self.event(event, message)
        self._said.add(event)

    def save(self, name: str = LAST) -> None:
        """Write a checkpoint, if the run has a folder; what all ranks share is rank 0's."""
        if name == LAST:
            self.state.counters.saved_at = self.state.counters.examples
        self.saver.restart_clock()  # on every rank, for any of them may find that time is up
        folder = self.run_dir
        if folder is None:
            return
        with self.watch.part("checkpoint"):
            generators = self.world.gather(checkpoint.generator_states())

            def save() -> None:
                self.saver.save(folder, {**self.state_dict(), "rank_generators": generators}, name)

            on_first_rank(self.world, save)
