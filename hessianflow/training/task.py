"""The arguments of a trainer: a task, the methods to do it with, and groups of settings.

Each record checks its own members; :mod:`checks` tells whether they fit together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from hessianflow.checks import check_count
from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    GradientObserver,
    HessianFlowError,
    LossFn,
    ResizableBatches,
)
from hessianflow.training.after_epoch import AfterEpoch
from hessianflow.training.arguments import (
    as_list,
    check_data,
    check_functions,
    check_parts,
    named,
)
from hessianflow.training.divergence import Divergence
from hessianflow.training.passes import Passes
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
    epochs: int

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        if not isinstance(self.model, nn.Module):
            raise HessianFlowError(f"model must be a torch.nn.Module, got {named(self.model)}")
        check_data(self.train_data, self.eval_data)
        check_functions(loss_fn=self.loss_fn)

    @property
    def device(self) -> torch.device:
        """Device on which the model is trained."""
        return next(self.model.parameters()).device


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
class Groups:
    """The settings of a trainer, in groups."""

    schedule: Schedule
    passes: Passes
    checkpoints: Checkpoints
    divergence: Divergence
    after_epoch: AfterEpoch
    reporting: Reporting
