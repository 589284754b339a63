"""Evaluation and measurements after each epoch, on the weights that are to be used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import Batch, EpochMeasurement, HessianFlowError, LossFn, World
from hessianflow.training.arguments import as_list, check_functions, check_parts
from hessianflow.training.evaluate import Evaluation, evaluate
from hessianflow.training.optimizers import set_mode
from hessianflow.training.timing import Stopwatch


@dataclass(frozen=True)
class AfterEpoch:
    """Settings of the work after every epoch besides the evaluation on the evaluation data.

    Attributes:
        curvature: whether the probe measures then; if not, only when the controller needs it.
        before_evaluation: called before the model is evaluated and saved as the best; it may set
            buffers, or replace the weights by an average.
        after_evaluation: called afterwards, even after an error, to restore the weights.
        measurements: made and recorded, such as
            :class:`~hessianflow.adversarial.RobustnessWatch`.

    Raises:
        HessianFlowError: a setting is not what it must be.
    """

    curvature: bool = True
    before_evaluation: Callable[[], None] | None = None
    after_evaluation: Callable[[], None] | None = None
    measurements: Sequence[EpochMeasurement] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, bool):
            raise HessianFlowError(
                "AfterEpoch.curvature must be True (after every epoch) or False (when the"
                f" controller needs it), got {self.curvature!r}"
            )
        check_functions(before_evaluation=self.before_evaluation)
        check_functions(after_evaluation=self.after_evaluation)
        object.__setattr__(self, "measurements", as_list("measurements", self.measurements))
        check_parts(measurements=self.measurements)


@dataclass
class Evaluator:
    """Evaluates and measures the model, with the weights that are to be used."""

    model: nn.Module
    data: Batch | Iterable[Batch] | None
    loss_fn: LossFn
    optimizer: Optimizer
    settings: AfterEpoch
    stopwatch: Stopwatch
    world: World

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the weights that are to be used in place of the trained ones while active."""
        before = self.settings.before_evaluation
        after = self.settings.after_evaluation
        try:
            with self.stopwatch.section("evaluation"):
                set_mode(self.optimizer, training=False)
                if before is not None:
                    before()
            yield
        finally:
            with self.stopwatch.section("evaluation"):
                if after is not None:
                    after()
                set_mode(self.optimizer, training=True)

    def evaluate(self) -> Evaluation | None:
        """Return the loss and accuracy on the data; None if there are no data."""
        if self.data is None:
            return None
        with self.stopwatch.section("evaluation"):
            return evaluate(self.model, self.data, self.loss_fn, reducer=self.world)

    def measure(self, made: int) -> Iterator[tuple[str, Mapping[str, float], str]]:
        """Make the measurements after the first `made`; yield kind, figures and warning of each."""
        for measurement in self.settings.measurements[made:]:
            with self.stopwatch.section("evaluation"):
                figures, warning = measurement()
            yield measurement.kind, figures, warning
