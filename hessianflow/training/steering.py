"""The decision in force, the request for the next one, and its application."""

from dataclasses import dataclass

from hessianflow.interfaces import Adversary, Decision, ResizableBatches
from hessianflow.runs import rows
from hessianflow.training.control_point import ControlPoint
from hessianflow.training.course import Course, Done
from hessianflow.training.divergence import hold
from hessianflow.training.exposing import share_in_force
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.reporting import Reporter
from hessianflow.training.totals import RunningTotals

OVER_BUDGET = (
    "a reading was left out: it would have exceeded the curvature budget, a share of the training"
    " so far; more will be (--curvature-budget raises it, 100 reads after every epoch)"
)
"""Recorded once a run, to explain the gaps in the readings."""


@dataclass
class Steering:
    """Asks the controller, and sets batch size and learning rate as it decides."""

    decision: Decision
    control: ControlPoint
    train_data: ResizableBatches
    rate: LearningRate
    totals: RunningTotals
    course: Course
    reporter: Reporter
    adversary: Adversary | None

    def decide(self, at_end: bool, done: Done) -> None:
        """Measure, ask the controller and apply its decision, unless `done` says that was done."""
        if done.decided:
            return
        progress = self.course.progress
        before = self.decision
        figures = {
            "train_loss": self.totals.last_loss,
            "epoch_loss": lambda: self.totals.means()[0],
            "learning_rate": lambda: self.rate.value,
        }
        outcome = self.control(progress, at_end, figures)
        after = before
        if outcome.decision is not None:
            after = self.held(outcome.decision)
        was = self._setting(before)
        now = self._setting(after)
        changed = now != was
        done.decided = True
        if changed:
            self.apply(after)
        if outcome.is_over_budget:
            self.reporter.say_once("budget", OVER_BUDGET)
        if outcome.signals:
            done.rows.append(rows.measurement_row(progress, "signals", outcome.signals))
        if outcome.reading is not None:
            note = ""
            # The row of a change gives its reason; without a decision, the reason is an older one.
            if not changed and outcome.decision is not None:
                note = after.reason
            done.rows.append(rows.reading_row(progress, outcome.reading, note))
        # A warm-up moves the rate at every step: such changes wait for the end of the epoch.
        if changed and (at_end or now[::2] != was[::2]):
            done.rows.append(rows.decision_row(progress, before, after, self.share(after)))

    def share(self, decision: Decision) -> float:
        """Return the share of each batch that is attacked under a decision."""
        return share_in_force(self.adversary, decision)

    def _setting(self, decision: Decision) -> tuple[int, float, float]:
        """Return the batch size, rate factor and share attacked under a decision."""
        return decision.batch_size, decision.lr_factor, self.share(decision)

    def apply(self, decision: Decision) -> None:
        """Train under `decision` from the very next batch on."""
        self.decision = decision = self.held(decision)
        if decision.batch_size != self.train_data.batch_size:
            self.train_data.set_batch_size(decision.batch_size)
        self.rate.factor = decision.lr_factor

    def held(self, decision: Decision) -> Decision:
        """Return the decision with its batch size limited to the cap that a divergence left."""
        counters = self.course.counters
        return hold(decision, counters.batch_cap, counters.cap_power, counters.cap_factor)
