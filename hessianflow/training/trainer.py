"""The trainer: a model, data and an optimizer, with a controller, an adversary and a probe.

The trainer knows protocols only (:mod:`hessianflow.interfaces`); :mod:`hessianflow.training.loop`
shows the order in which they act. Rates and groups of the optimizer, and the parameters that are
trained, may change during a run: they are read again at every step.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.checks import in_home
from hessianflow.interfaces import (
    UNKNOWN,
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    ChecksRows,
    CurvatureProbe,
    GradientObserver,
    LossFn,
    ResizableBatches,
    World,
)
from hessianflow.training.assembly import assemble
from hessianflow.training.checks import (
    as_group,
    check_probe,
    check_run,
    check_signals,
    idle_adversary,
    unheld_state,
)
from hessianflow.training.divergence import Divergence
from hessianflow.training.extent import Every, Extent
from hessianflow.training.lookahead import check_staleness
from hessianflow.training.reporting import Reporting
from hessianflow.training.run import Run
from hessianflow.training.saving import Checkpoints
from hessianflow.training.schedule import Schedule, misfit
from hessianflow.training.task import AfterEpoch, Groups, Methods, Passes, Task
from hessianflow.training.world import LocalWorld


class AdaptiveBatchTrainer(Run):
    """Trains a model while a controller sets batch size, learning-rate and attack factor.

    Args:
        model: any module; trained in place, on the device its parameters are on.
        train_data: a :class:`~hessianflow.interfaces.ResizableBatches`, such as
            `hf.data.DeviceBatches` (tensors) or `hf.data.AdaptiveBatches` (any map-style Dataset).
        eval_data: one (inputs, targets) pair or a re-iterable of pairs, evaluated after every
            epoch.
        optimizer: any torch optimizer; stepped by its own `step()`, with a closure where that
            requires one (SAM, LBFGS) or where its `wants_closure` is true, on gradients with a
            graph where its `is_second_order` is true. One with `train()` and `eval()` (the
            schedule-free ones) is switched to the mode of training or evaluation.
        loss_fn: loss_fn(outputs, targets), a mean over examples (or a sum or a vector: see
            `LossFn`). For batches that are one mapping, it is called as loss_fn(model, batch);
            :class:`hessianflow.ModelLoss` is the loss that the model computes itself.
        epochs: passes over the training data. At least one limit (`epochs`, `max_updates` or
            `max_examples`) must be given, and the run ends at the first that it reaches.
        max_updates: largest number of optimizer steps.
        max_examples: largest number of training examples; the batch that reaches it is the last
            one. For sequences of equal length, it is the number of tokens divided by that length.
        every: length of an epoch, if that is not a pass over the data: evaluation, record,
            checkpoint, reading and decision follow each such stretch, and records and controllers
            count it as an epoch. `Every(updates=500)` suits a run of a single pass, or data of
            unknown length.
        controller: decides the batch size; None keeps that of `train_data`.
        adversary: perturbs its share of each batch, or trains on adversarial twins of it
            (:class:`~hessianflow.adversarial.ConcurrentAdversary`); the controller's
            `attack_factor` multiplies the share. Progress counts the examples drawn from the
            data.
        probe: measures curvature, when the controller needs it and after every epoch (unless
            `after_epoch` says otherwise).
        observers: shown the gradient of every microbatch; their signals go to the controller.
        transform: applied to each whole batch before the adversary.
        schedule: the learning-rate schedule, in epochs or in reference batches, and the batch size
            at which rates are stated. A scheduler alone stands for `Schedule(scheduler)`.
        passes: settings of the gradient: microbatches, batch normalisation, precision, clipping.
        checkpoints: when checkpoints are saved, what they hold, and how many are kept.
        divergence: what counts as a divergence, and whether to stop or to roll back then.
        after_epoch: what is done after every epoch besides the evaluation.
        run_dir: folder of config, history, checkpoints and summary; None keeps records in memory.
        reporting: further receivers of the records, and the progress bar.
        world: the ranks to train with, such as `hf.distributed.GroupWorld(reducer)`; every rank
            makes a trainer of the same settings and calls the same methods. None: this process
            alone.

    Raises:
        HessianFlowError: an argument is not what it must be; no parameter is trainable; the batch
            is larger than the data; the scheduler belongs to another optimizer, or was built for
            another number of steps; the adversary is staler than the run is long; or the probe is
            of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: ResizableBatches,
        eval_data: Batch | Iterable[Batch] | None = None,
        *,
        optimizer: Optimizer,
        loss_fn: LossFn,
        epochs: int | None = None,
        max_updates: int | None = None,
        max_examples: int | None = None,
        every: Every | None = None,
        controller: BatchController | None = None,
        adversary: Adversary | None = None,
        probe: CurvatureProbe | None = None,
        observers: Sequence[GradientObserver] = (),
        transform: BatchTransform | None = None,
        schedule: Schedule | LRScheduler | None = None,
        passes: Passes | None = None,
        checkpoints: Checkpoints | None = None,
        divergence: Divergence | None = None,
        after_epoch: AfterEpoch | None = None,
        run_dir: str | Path | None = None,
        reporting: Reporting | None = None,
        world: World | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            schedule = Schedule(schedule)
        groups = Groups(
            schedule,
            as_group("passes", passes, Passes),
            as_group("checkpoints", checkpoints, Checkpoints),
            as_group("divergence", divergence, Divergence),
            as_group("after_epoch", after_epoch, AfterEpoch),
            as_group("reporting", reporting, Reporting),
        )
        examples = getattr(train_data, "num_examples", UNKNOWN)  # Task refuses objects without it.
        extent = Extent(examples, epochs, max_updates, max_examples, every)
        task = Task(model, train_data, eval_data, optimizer, loss_fn, extent)
        methods = Methods(controller, adversary, probe, observers, transform)
        _check_fit(task, methods, groups)
        folder: Path | None = None
        if run_dir is not None:
            folder = in_home(run_dir)
        loop = assemble(task, methods, groups, folder, world or LocalWorld())
        is_cut = loop.step.microbatch.size < loop.steering.decision.batch_size
        if (controller is not None or is_cut) and isinstance(train_data, ChecksRows):
            train_data.check_rows()
        notices = _notices(task, methods, groups, folder, loop.rate.reference_batch_size)
        super().__init__(loop, groups.reporting.config, notices)


def _check_fit(task: Task, methods: Methods, groups: Groups) -> None:
    """Refuse a task, methods and settings that do not fit together."""
    examples = min(task.train_data.num_examples, task.extent.examples_per_epoch)
    batch_size = methods.first_decision(task.train_data).batch_size
    has_probe = methods.probe is not None
    check_signals(methods.controller, has_probe, bool(methods.observers), examples)
    check_run(task.model, task.optimizer, batch_size, examples)
    check_probe(methods.probe, task.model, groups.checkpoints.state)
    check_staleness(methods.staleness, batch_size, task.extent)


def _notices(
    task: Task, methods: Methods, groups: Groups, folder: Path | None, reference: int
) -> list[str]:
    """Return what the records say at the start about parts that may not do what they seem to."""
    schedule = groups.schedule
    return [
        idle_adversary(methods.controller, methods.adversary),
        misfit(schedule.scheduler, schedule.unit, task.extent, reference),
        unheld_state(folder, task.optimizer, groups.checkpoints.state),
    ]
