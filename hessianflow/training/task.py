"""What a trainer was asked for: a task, the methods to do it with, and settings in groups.

Each record checks its own members; :mod:`checks` tells whether they fit together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.checks import check_count
from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    GradientObserver,
    LossFn,
    ResizableBatches,
)
from hessianflow.training.after_epoch import AfterEpoch
from hessianflow.training.arguments import (
    as_group,
    as_list,
    check_data,
    check_functions,
    check_model,
    check_parts,
)
from hessianflow.training.divergence import Divergence
from hessianflow.training.passes import Passes
from hessianflow.training.reporting import Reporting
from hessianflow.training.saving import Checkpoints
from hessianflow.training.schedule import Schedule


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long."""

    model: nn.Module
    train_data: ResizableBatches
    eval_data: Batch | Iterable[Batch] | None
    optimizer: Optimizer
    loss_fn: LossFn
    epochs: int

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_model(self.model)
        check_data(self.train_data, self.eval_data)
        check_functions(loss_fn=self.loss_fn)

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Methods:
    """Who takes part in the training besides the optimizer."""

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
        return 0 if self.adversary is None else self.adversary.staleness

    def first_decision(self, train_data: ResizableBatches) -> Decision:
        """Return the decision to start with."""
        if self.controller is None:
            return Decision(train_data.batch_size)
        return self.controller.decision


@dataclass(frozen=True)
class Groups:
    """The settings of a trainer, in the groups that it takes them in."""

    schedule: Schedule
    passes: Passes
    checkpoints: Checkpoints
    divergence: Divergence
    after_epoch: AfterEpoch
    reporting: Reporting


def as_groups(
    schedule: Schedule | LRScheduler | None,
    passes: Passes | None,
    checkpoints: Checkpoints | None,
    divergence: Divergence | None,
    after_epoch: AfterEpoch | None,
    reporting: Reporting | None,
) -> Groups:
    """Return the groups that were given, and the defaults of the others.

    Raises:
        HessianFlowError: one of them is something else.
    """
    if not isinstance(schedule, Schedule):
        schedule = Schedule(schedule)
    return Groups(
        schedule,
        as_group("passes", passes, Passes),
        as_group("checkpoints", checkpoints, Checkpoints),
        as_group("divergence", divergence, Divergence),
        as_group("after_epoch", after_epoch, AfterEpoch),
        as_group("reporting", reporting, Reporting),
    )
