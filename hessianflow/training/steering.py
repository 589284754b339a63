"""The decision in force, what is measured for the next one, and its application."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from hessianflow.interfaces import (
    BatchController,
    Budgeted,
    CurvatureReading,
    Decision,
    Progress,
    Remarks,
)
from hessianflow.runs import rows
from hessianflow.training.course import Course, Done
from hessianflow.training.divergence import hold
from hessianflow.training.exposing import share_in_force
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.reporting import Reporter
from hessianflow.training.step import TrainingStep
from hessianflow.training.totals import RunningTotals

OVER_BUDGET = (
    "a reading was left out: it would have exceeded the curvature budget, a share of the training"
    " so far; more will be (--curvature-budget raises it, 100 reads after every epoch)"
)
"""Recorded once a run, to explain the gaps in the readings."""


@dataclass
class Steering:
    """Asks the controller, and sets batch size and learning rate as it decides.

    The controller is asked after every step, and only what it needs is measured. All ranks measure
    together. The controllers of all ranks are shown rank 0's figures, and rank 0's decision counts.

    A probe that is :class:`~hessianflow.interfaces.Budgeted` is asked first; if it declines, the
    controller decides without a reading.

    Attributes:
        decision: the decision in force.
        every_epoch: whether the probe also measures after every epoch.
        last_eigenvalue: the newest top eigenvalue, for display.
    """

    decision: Decision
    every_epoch: bool
    step: TrainingStep
    rate: LearningRate
    totals: RunningTotals
    course: Course
    reporter: Reporter
    last_eigenvalue: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.methods = self.step.methods
        self.train_data = self.step.task.train_data
        self.stopwatch = self.step.stopwatch
        self.world = self.step.world

    def decide(self, at_end: bool, done: Done) -> None:
        """Measure, ask the controller and apply its decision, unless `done` says that was done."""
        if done.decided:
            return
        progress = self.course.progress
        controller = self._controller_due(progress)
        by_curvature = controller is not None and "eigenvalue" in controller.needs
        reading: CurvatureReading | None = None
        if by_curvature or (at_end and self.every_epoch):
            reading = self._read(progress)
        signals: dict[str, float] = {}
        before = self.decision
        after = before
        if controller is not None:
            signals = self._signals(controller.needs)
            after = self.held(self.world.broadcast(controller.update(progress, reading, signals)))
        was = self._setting(before)
        now = self._setting(after)
        changed = now != was
        done.decided = True
        if changed:
            self.apply(after)
        if signals:
            done.rows.append(rows.measurement_row(progress, "signals", signals))
        if reading is not None:
            done.figures["eigenvalue"] = reading.eigenvalue
            note = ""
            # The row of a change gives its reason; without a decision, the reason is an older one.
            if not changed and controller is not None:
                note = after.reason
            done.rows.append(rows.reading_row(progress, reading, note))
        # A warm-up moves the rate at every step: such changes wait for the end of the epoch.
        if changed and (at_end or now[::2] != was[::2]):
            done.rows.append(rows.decision_row(progress, before, after, self.share(after)))

    def _controller_due(self, progress: Progress) -> BatchController | None:
        """Return the controller if it is to decide now."""
        controller = self.methods.controller
        # At the end of the run there is nothing left that a decision could change.
        if controller is None or self.course.is_over or not controller.is_due(progress):
            return None
        return controller

    def _read(self, progress: Progress) -> CurvatureReading | None:
        """Return a reading of the probe; None where there is no probe, or it declines."""
        probe = self.methods.probe
        if probe is None:
            return None
        if isinstance(probe, Budgeted) and not probe.is_affordable(progress.examples):
            self.reporter.say_once("budget", OVER_BUDGET)
            return None
        with self.stopwatch.section("curvature"):
            self.world.average_buffers()
            reading: CurvatureReading = self.world.broadcast(probe())
        if isinstance(probe, Remarks) and probe.note:
            self.reporter.say_once("curvature", probe.note)
        self.last_eigenvalue = reading.eigenvalue
        return reading

    def _signals(self, needs: Set[str]) -> dict[str, float]:
        """Return the signals of the observers, and those of the loop that the controller needs."""
        figures: dict[str, Callable[[], float]] = {
            "train_loss": self.totals.last_loss,
            "epoch_loss": lambda: self.totals.means()[0],
            "learning_rate": lambda: self.rate.value,
        }
        signals: dict[str, float] = {}
        for observer in self.methods.observers:
            signals |= observer.signals()
        signals |= {name: figure() for name, figure in figures.items() if name in needs}
        if signals:
            signals = self.world.broadcast(signals)
        return signals

    def share(self, decision: Decision) -> float:
        """Return the share of each batch that is attacked under a decision."""
        return share_in_force(self.methods.adversary, decision)

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
