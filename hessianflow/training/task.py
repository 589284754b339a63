"""The arguments of a trainer: a task, the methods to do it with, and groups of settings.

Each record checks its own members; the trainer checks whether they fit together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn
from torch.optim import Optimizer

from hessianflow.checks import check_choice, check_count, check_limit
from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    EpochMeasurement,
    GradientObserver,
    HessianFlowError,
    LossFn,
    ResizableBatches,
)
from hessianflow.normalisation.settle import NormStatistics
from hessianflow.training.accumulate import Precision
from hessianflow.training.best import Best
from hessianflow.training.checks import (
    as_list,
    check_data,
    check_functions,
    check_parts,
    named,
)
from hessianflow.training.divergence import Divergence
from hessianflow.training.extent import Extent
from hessianflow.training.reporting import Reporting
from hessianflow.training.saving import Checkpoints
from hessianflow.training.schedule import Schedule


@dataclass(frozen=True)
class Task:
    """The model, data, optimizer and loss of a run, and its length."""

    model: nn.Module
    train_data: ResizableBatches
    eval_data: Batch | Iterable[Batch] | None
    optimizer: Optimizer
    loss_fn: LossFn
    extent: Extent

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise HessianFlowError(f"model must be a torch.nn.Module, got {named(self.model)}")
        check_data(self.train_data, self.eval_data)
        check_functions(loss_fn=self.loss_fn)


@dataclass(frozen=True)
class Methods:
    """The parts that take part in the training besides the optimizer."""

    controller: BatchController | None
    adversary: Adversary | None
    probe: CurvatureProbe | None
    observers: Sequence[GradientObserver]
    transform: BatchTransform | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "observers", as_list("observers", self.observers))
        check_parts(controller=self.controller, adversary=self.adversary, probe=self.probe)
        check_parts(observers=self.observers)
        check_functions(transform=self.transform)

    @property
    def staleness(self) -> int:
        """Steps between the attack on a batch and its use."""
        if self.adversary is None:
            return 0
        return self.adversary.staleness

    def first_decision(self, train_data: ResizableBatches) -> Decision:
        """Return the decision at the start of the run."""
        if self.controller is None:
            return Decision(train_data.batch_size)
        return self.controller.decision


@dataclass(frozen=True)
class Passes:
    """Settings of the forward and backward passes of a step.

    None of them changes the optimization batch: its gradient is that of the mean loss over the
    whole batch, however it is cut.

    Attributes:
        microbatch_size: examples per forward pass on the device; halved for good when memory runs
            out. "auto" looks for the fastest that fits. None: "auto" on a GPU, elsewhere the
            reference batch size.
        norm_batch_size: examples that batch normalisation sees at once in training ("ghost" batch
            normalisation). None: the reference batch size, as the published runs had in effect. 0:
            the whole microbatch.
        norm_statistics: "settled": where the running statistics of batch normalisation have not
            settled at the end of an epoch, they are measured again on the batch trained last,
            before any other measurement (:mod:`~hessianflow.normalisation.settle`). "running": they
            are left as training made them; with it the probe's `check_statistics=False` gives the
            signal of ABSA's published code.
        precision: "float32", or autocast in "bf16" or "fp16" (the latter with loss scaling).
        max_grad_norm: the gradient of each step is clipped to this norm; None: it is not clipped.
    """

    microbatch_size: int | Literal["auto"] | None = None
    norm_batch_size: int | None = None
    norm_statistics: NormStatistics = "settled"
    precision: Precision = "float32"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.microbatch_size != "auto":
            either = 'the default, or "auto"'
            check_count("Passes.microbatch_size", self.microbatch_size, none=either)
        default = "the reference batch size"
        check_count("Passes.norm_batch_size", self.norm_batch_size, 0, none=default)
        check_choice("Passes.norm_statistics", self.norm_statistics, get_args(NormStatistics))
        check_choice("Passes.precision", self.precision, get_args(Precision))
        check_limit("Passes.max_grad_norm", self.max_grad_norm, "no clipping")

    def norm_group(self, reference_batch_size: int) -> int | None:
        """Return the examples that batch normalisation sees at once; None: the microbatch."""
        if self.norm_batch_size is None:
            return reference_batch_size
        return self.norm_batch_size or None


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
        best: the figure that decides which model is kept as the best, and the number of epochs
            without an improvement after which the run ends.
    """

    curvature: bool = True
    before_evaluation: Callable[[], None] | None = None
    after_evaluation: Callable[[], None] | None = None
    measurements: Sequence[EpochMeasurement] = ()
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, bool):
            raise HessianFlowError(
                "AfterEpoch.curvature must be True (after every epoch) or False (when the"
                f" controller needs it), got {self.curvature!r}"
            )
        if not isinstance(self.best, Best):
            raise HessianFlowError(
                f"AfterEpoch.best must be a hf.training.Best, got {self.best!r}: pass one, as in"
                ' Best("eval_loss", "min")'
            )
        before = self.before_evaluation
        check_functions(before_evaluation=before, after_evaluation=self.after_evaluation)
        object.__setattr__(self, "measurements", as_list("measurements", self.measurements))
        check_parts(measurements=self.measurements)


@dataclass(frozen=True)
class Groups:
    """The settings of a trainer, in groups.

    Each group raises a HessianFlowError when a setting is not what it must be.
    """

    schedule: Schedule
    passes: Passes
    checkpoints: Checkpoints
    divergence: Divergence
    after_epoch: AfterEpoch
    reporting: Reporting
