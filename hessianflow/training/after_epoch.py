"""What happens after each epoch: the model gets the weights it is to be used with, is evaluated and
measured, and gets back the weights that are trained."""

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
    """What is done after every epoch besides the evaluation on the evaluation data.

    Attributes:
        curvature: whether the probe measures the curvature then; if not, it measures only when the
            controller needs it.
        before_evaluation: called before the model is evaluated and saved as the best; it may set
            buffers, or replace the weights by an average.
        after_evaluation: called after that, even after an error, to restore the weights.
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
    """Evaluates and measures the model, with the weights that are to be used.

    Attributes:
        model: the model to evaluate.
        data: the data to evaluate on; None: no evaluation.
        loss_fn: the loss, as in training.
        optimizer: the optimizer, told when its weights are to be used rather than trained, if it
            distinguishes the two.
        settings: what is called before and after the evaluation, and measured.
        stopwatch: counts the time.
        world: the ranks that evaluate together.
    """

    model: nn.Module
    data: Batch | Iterable[Batch] | None
    loss_fn: LossFn
    optimizer: Optimizer
    settings: AfterEpoch
    stopwatch: Stopwatch
    world: World

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the weights that are to be used, instead of those to be trained on, while active."""
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
        """Yield the kind, figures and warning of every measurement but the first `made`, as it is
        made."""
        for measurement in self.settings.measurements[made:]:
            with self.stopwatch.section("evaluation"):
                figures, warning = measurement()
            yield measurement.kind, figures, warning
