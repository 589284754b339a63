"""What happens after each epoch: the model gets the weights it is to be used with, is evaluated and
measured, and gets back the weights that are trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import Batch, EpochMeasurement, LossFn, World
from hessianflow.training.evaluate import Evaluation, evaluate
from hessianflow.training.optimizers import set_mode
from hessianflow.training.timing import Stopwatch


@dataclass
class AfterEpoch:
    """The parts of an evaluation.

    Attributes:
        model: the model to evaluate.
        data: the data to evaluate on; None: no evaluation.
        loss_fn: the loss, as in training.
        optimizer: the optimizer, told when its weights are to be used rather than trained, if it
            distinguishes the two.
        measurements: what is measured after the evaluation.
        watch: counts the time.
        world: the ranks that evaluate together.
        before: called first.
        after: called last, whatever happens in between.
    """

    model: nn.Module
    data: Batch | Iterable[Batch] | None
    loss_fn: LossFn
    optimizer: Optimizer
    measurements: Sequence[EpochMeasurement]
    watch: Stopwatch
    world: World
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the weights that are to be used, instead of those to be trained on, while active."""
        try:
            with self.watch.part("evaluation"):
                set_mode(self.optimizer, training=False)
                if self.before is not None:
                    self.before()
            yield
        finally:
            with self.watch.part("evaluation"):
                if self.after is not None:
                    self.after()
                set_mode(self.optimizer, training=True)

    def evaluate(self) -> Evaluation | None:
        """Return the loss and accuracy on the data; None if there are no data."""
        if self.data is None:
            return None
        with self.watch.part("evaluation"):
            return evaluate(self.model, self.data, self.loss_fn, reducer=self.world)

    def measure(self, made: int) -> Iterator[tuple[str, Mapping[str, float], str]]:
        """Yield the kind, figures and warning of every measurement but the first `made`, as it is
        made."""
        for measurement in self.measurements[made:]:
            with self.watch.part("evaluation"):
                figures, warning = measurement()
            yield measurement.kind, figures, warning
