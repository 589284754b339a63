"""Measures what the controller needs when it is due, and asks it for a decision."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hessianflow.interfaces import (
    BatchController,
    Budgeted,
    CurvatureProbe,
    CurvatureReading,
    Decision,
    GradientObserver,
    Progress,
    World,
)
from hessianflow.training.timing import Stopwatch


@dataclass(frozen=True)
class Outcome:
    """The measurements and the decision at one point of a run.

    Attributes:
        reading: the curvature reading, if one was made.
        signals: the other figures that the controller was shown.
        decision: the controller's decision; None when it was not due.
        is_over_budget: whether a reading was left out because it would exceed the probe's budget.
    """

    reading: CurvatureReading | None
    signals: Mapping[str, float]
    decision: Decision | None
    is_over_budget: bool


@dataclass
class ControlPoint:
    """Asks the controller after every step, and measures only what it needs.

    All ranks measure together. The controllers of all ranks are shown rank 0's figures, and rank
    0's decision counts.

    Attributes:
        controller: decides; None: there are no decisions.
        probe: measures curvature when the controller needs it. One that is
            :class:`~hessianflow.interfaces.Budgeted` is asked first; if it declines, the controller
            decides without a reading.
        observers: their signals go to the controller.
        every_epoch: whether the probe also measures after every epoch.
        stopwatch: counts the time of the probe.
        world: the ranks that decide together.
        last_eigenvalue: the newest top eigenvalue, for display.
    """

    controller: BatchController | None
    probe: CurvatureProbe | None
    observers: Sequence[GradientObserver]
    every_epoch: bool
    stopwatch: Stopwatch
    world: World
    last_eigenvalue: float | None = field(default=None, init=False)

    def __call__(
        self, progress: Progress, at_end: bool, figures: Mapping[str, Callable[[], float]]
    ) -> Outcome:
        """Measure and decide; a figure of the loop is computed only if the controller needs it."""
        controller = self.controller
        # At the end of the run there is nothing left that a decision could change.
        is_over = progress.epoch >= progress.total_epochs
        if controller is not None and (is_over or not controller.is_due(progress)):
            controller = None
        reading = None
        over_budget = False
        wanted = at_end and self.every_epoch
        wanted = wanted or (controller is not None and "eigenvalue" in controller.needs)
        if self.probe is not None and wanted:
            if isinstance(self.probe, Budgeted):
                over_budget = not self.probe.is_affordable(progress.examples)
            if not over_budget:
                reading = self._read(self.probe)
        if controller is None:
            return Outcome(reading, {}, None, over_budget)
        signals: dict[str, float] = {}
        for observer in self.observers:
            signals |= observer.signals()
        needs = controller.needs
        signals |= {name: figure() for name, figure in figures.items() if name in needs}
        if signals:
            signals = self.world.broadcast(signals)
        decision = self.world.broadcast(controller.update(progress, reading, signals))
        return Outcome(reading, signals, decision, over_budget)

    def _read(self, probe: CurvatureProbe) -> CurvatureReading:
        with self.stopwatch.section("curvature"):
            self.world.average_buffers()
            reading: CurvatureReading = self.world.broadcast(probe())
        self.last_eigenvalue = reading.eigenvalue
        return reading
