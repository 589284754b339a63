"""Where measuring and deciding meet: is the controller due, what does it need, what does it want
now."""

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
    """What was measured and decided at one point.

    Attributes:
        reading: of the curvature, if one was made.
        signals: what the controller was shown besides.
        decision: None when the controller was not due.
        is_over_budget: whether a reading was wanted, but would have exceeded the probe's budget.
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
        controller: decides; None never does.
        probe: measures curvature when the controller needs it and, with `every_epoch`, after every
            epoch. One that is :class:`~hessianflow.interfaces.Budgeted` is asked first; where it
            says no, the controller decides without a reading.
        observers: their signals go to the controller.
        every_epoch: whether the probe measures after every epoch.
        stopwatch: counts the time of the probe.
        world: the ranks that decide together.
        last_reading: the newest reading, for display.
    """

    controller: BatchController | None
    probe: CurvatureProbe | None
    observers: Sequence[GradientObserver]
    every_epoch: bool
    stopwatch: Stopwatch
    world: World
    last_reading: CurvatureReading | None = field(default=None, init=False)

    def __call__(
        self, progress: Progress, at_end: bool, figures: Mapping[str, Callable[[], float]]
    ) -> Outcome:
        """Measure and decide; `figures`: what the loop itself can tell by name, read only if
        needed."""
        controller = self.controller
        # nothing is left that a decision could change
        done = progress.epoch >= progress.total_epochs
        if controller is not None and (done or not controller.is_due(progress)):
            controller = None
        needs = frozenset[str]() if controller is None else controller.needs
        reading = None
        over_budget = False
        wanted = "eigenvalue" in needs or (at_end and self.every_epoch)
        if self.probe is not None and wanted:
            if isinstance(self.probe, Budgeted):
                over_budget = not self.probe.is_affordable(progress.examples)
            if not over_budget:
                with self.stopwatch.section("curvature"):
                    self.world.average_buffers()
                    reading = self.last_reading = self.world.broadcast(self.probe())
        if controller is None:
            return Outcome(reading, {}, None, over_budget)
        signals = {
            name: value for observer in self.observers for name, value in observer.signals().items()
        }
        signals |= {name: figure() for name, figure in figures.items() if name in needs}
        signals = self.world.broadcast(signals) if signals else signals
        decision = self.world.broadcast(controller.update(progress, reading, signals))
        return Outcome(reading, signals, decision, over_budget)
