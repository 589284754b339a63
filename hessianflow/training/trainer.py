"""The training loop: batches whose size a controller sets, an adversary, and curvature, around any
optimizer.

The trainer knows protocols only (:mod:`hessianflow.interfaces`). One step: next batch at the
current size -> batch transform -> adversary -> gradient in microbatches, each weighted by its
examples -> optimizer step -> progress counted in examples -> if the
controller is due: probe -> reading -> `controller.update` -> decision applied and recorded.

What may change during a run is asked anew at every step: rates and groups of the optimizer, which
parameters are trained. Hooks on the accumulation of gradients run once a step on the whole
gradient, whatever the microbatches; hooks on gradients see the share of each microbatch, as in any
loop that accumulates.

On several ranks every rank runs this loop on its part of every batch. What depends on a clock, a
signal or one rank's numbers is agreed on through the world before anybody acts on it; rank 0 alone
keeps the records.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.checks import in_home
from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    EpochMeasurement,
    GradientObserver,
    LossFn,
    RecordSink,
    ResizableBatches,
    Stateful,
    World,
)
from hessianflow.normalisation.settle import NormStatistics
from hessianflow.runs import Recorder
from hessianflow.training.accumulate import GradientAccumulator, Precision
from hessianflow.training.after_epoch import AfterEpoch
from hessianflow.training.arguments import (
    as_list,
    check_data,
    check_functions,
    check_model,
    check_parts,
    check_settings,
)
from hessianflow.training.checks import (
    check_probe,
    check_rows,
    check_run,
    check_signals,
    idle_adversary,
    unheld_state,
)
from hessianflow.training.control_point import ControlPoint, CurvatureSchedule
from hessianflow.training.divergence import DivergencePolicy, OnDivergence
from hessianflow.training.explosion import ExplosionRule
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.lookahead import Lookahead, check_staleness
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.microbatch import microbatches
from hessianflow.training.model_state import ModelState
from hessianflow.training.parameters import TrainedParameters
from hessianflow.training.run import Run
from hessianflow.training.saving import Saver
from hessianflow.training.schedule import ScheduleUnit, misfit
from hessianflow.training.settings import flat, of_controller, of_optimizer
from hessianflow.training.state import RunState, numbered, stateful_parts
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals
from hessianflow.training.world import LocalWorld

NO_STATE: Mapping[str, Stateful] = MappingProxyType({})


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
            `LossFn`).
        controller: decides the batch size; None keeps that of `train_data`.
        adversary: perturbs its share of each batch, or trains on adversarial twins of it
            (:class:`~hessianflow.adversarial.ConcurrentAdversary`); the controller's
            `attack_factor` multiplies the share. Progress counts the examples drawn from the data.
        epochs: passes over the training data.
        scheduler: any scheduler of torch or timm, built for this optimizer. A rate that it sets in
            the optimizer's groups (or that is set by hand, at any time) is the rate at the
            reference batch size; during each step the controller's factor multiplies it.
        schedule_unit: "epoch": the scheduler takes `epochs` steps, one an epoch. "reference_batch":
            one per reference batch of examples, int(epochs * num_examples / reference_batch_size)
            in all, so that a schedule counted in steps keeps its meaning when the batch grows.
        probe: measures curvature, when the controller needs it and, with `curvature="epoch"`, after
            every epoch.
        reference_batch_size: batch size that the learning rate is stated at; None: the one the run
            starts with.
        microbatch_size: examples per forward pass on the device; halved for good when memory runs
            out. "auto" looks for the fastest that fits. None: "auto" on a GPU, elsewhere the
            reference batch size.
        norm_batch_size: examples that batch normalisation sees at once in training ("ghost" batch
            normalisation). None: the reference batch size, as the published runs had in effect. 0:
            the whole microbatch.
        norm_statistics: "settled": where the running statistics of batch normalisation have not
            settled at the end of an epoch, they are measured anew on the batch trained last, before
            anything is measured, evaluated or saved (:mod:`~hessianflow.normalisation.settle`).
            "running": they are left as training made them; with it the probe's
            `check_statistics=False` gives the signal of ABSA's published code.
        transform: applied to each whole batch before the adversary.
        before_evaluation: called after every epoch, before the model is evaluated and saved as the
            best; it may set buffers, or replace the weights by an average.
        after_evaluation: called after that, even after an error, to restore the weights.
        measurements: made and recorded after every epoch, such as
            :class:`~hessianflow.adversarial.RobustnessWatch`.
        observers: shown the gradient of every microbatch; their signals go to the controller.
        max_grad_norm: clip the gradient of each step to this norm; None: do not.
        precision: "float32", or autocast in "bf16" or "fp16" (the latter with loss scaling).
        run_dir: where config, history, checkpoints and summary go; None keeps records in memory.
        config: settings to write to config.json besides the trainer's own.
        sinks: other receivers of every record.
        state: by name, other objects whose state every checkpoint is to hold, such as an average of
            the weights (`torch.optim.swa_utils.AveragedModel`) or a generator in a class of its
            own. Their `state_dict` and `load_state_dict` must deal in tensors and plain values. The
            trainer itself saves model, optimizer, scheduler, data, controller, adversary, probe,
            observers, measurements, a transform and a loss that have states, and the global random
            generators.
        checkpoint_examples: also save a checkpoint each time this many examples have been trained.
        checkpoint_minutes: also save a checkpoint each time this many minutes have passed.
        keep_checkpoints: how many of the newest are kept (the best one is kept as well).
        on_divergence: when the loss is no longer finite, or explodes: "stop", or "rollback": go
            back to the last checkpoint, undo the last growth and keep the batch below it from then
            on.
        max_loss_ratio: a loss explodes if it stays above this many times the mean of the run so
            far, for longer than rare large losses do (:mod:`~hessianflow.training.explosion`);
            None: a finite loss never does.
        max_rollbacks: how many rollbacks are made before the run stops anyway.
        show_progress: True, False, or None: only on a terminal.
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
        controller: BatchController | None = None,
        adversary: Adversary | None = None,
        epochs: int,
        scheduler: LRScheduler | None = None,
        schedule_unit: ScheduleUnit = "epoch",
        probe: CurvatureProbe | None = None,
        curvature: CurvatureSchedule = "epoch",
        reference_batch_size: int | None = None,
        microbatch_size: int | Literal["auto"] | None = None,
        norm_batch_size: int | None = None,
        norm_statistics: NormStatistics = "settled",
        transform: BatchTransform | None = None,
        before_evaluation: Callable[[], None] | None = None,
        after_evaluation: Callable[[], None] | None = None,
        measurements: Sequence[EpochMeasurement] = (),
        observers: Sequence[GradientObserver] = (),
        max_grad_norm: float | None = None,
        precision: Precision = "float32",
        run_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        state: Mapping[str, Stateful] = NO_STATE,
        checkpoint_examples: int | None = None,
        checkpoint_minutes: float | None = None,
        keep_checkpoints: int = 2,
        on_divergence: OnDivergence = "stop",
        max_loss_ratio: float | None = 100.0,
        max_rollbacks: int = 3,
        show_progress: bool | None = None,
        world: World | None = None,
    ) -> None:
        check_settings(
            epochs=epochs,
            schedule_unit=schedule_unit,
            curvature=curvature,
            precision=precision,
            on_divergence=on_divergence,
            reference_batch_size=reference_batch_size,
            microbatch_size=microbatch_size,
            norm_batch_size=norm_batch_size,
            norm_statistics=norm_statistics,
            max_grad_norm=max_grad_norm,
            max_loss_ratio=max_loss_ratio,
            checkpoint_examples=checkpoint_examples,
            checkpoint_minutes=checkpoint_minutes,
            keep_checkpoints=keep_checkpoints,
            max_rollbacks=max_rollbacks,
            show_progress=show_progress,
        )
        check_model(model)
        check_data(train_data, eval_data)
        measurements, observers = (
            as_list("measurements", measurements),
            as_list("observers", observers),
        )
        sinks = as_list("sinks", sinks)
        world = LocalWorld() if world is None else world
        check_parts(controller=controller, adversary=adversary, probe=probe, observers=observers)
        check_parts(measurements=measurements, sinks=sinks, state=state)
        check_functions(loss_fn=loss_fn, transform=transform)
        check_functions(before_evaluation=before_evaluation, after_evaluation=after_evaluation)
        examples = train_data.num_examples
        decision = Decision(train_data.batch_size) if controller is None else controller.decision
        check_signals(controller, probe is not None, bool(observers), examples)
        check_run(model, optimizer, decision.batch_size, examples)
        check_probe(probe, model, state)
        depth = 0 if adversary is None else adversary.staleness
        check_staleness(depth, decision.batch_size, examples, epochs)
        reference = decision.batch_size if reference_batch_size is None else reference_batch_size
        norm_size = reference if norm_batch_size is None else norm_batch_size or None
        watch = Stopwatch(next(model.parameters()).device)
        microbatch, paired = microbatches(model, world, microbatch_size, reference, examples)
        if controller is not None or microbatch.size < decision.batch_size:
            check_rows(train_data)
        trained = TrainedParameters(model, optimizer)
        accumulate = GradientAccumulator(
            model, loss_fn, trained.current, observers, precision, norm_size, world, paired
        )
        step = TrainingStep(
            model,
            optimizer,
            accumulate,
            microbatch,
            adversary,
            transform,
            watch,
            watch.device,
            world,
            trained,
            max_grad_norm,
        )
        ahead = Lookahead(train_data, depth, step.load, watch.device, watch)
        totals = RunningTotals(watch.device, watch.totals(), ExplosionRule(max_loss_ratio))
        rate = LearningRate(optimizer, scheduler, schedule_unit)
        control = ControlPoint(controller, probe, tuple(observers), curvature, watch, world)
        folder = None if run_dir is None else in_home(run_dir)
        built = {
            "epochs": epochs,
            "schedule_unit": schedule_unit,
            "reference_batch_size": reference,
            "norm_batch_size": norm_size,
            "norm_statistics": norm_statistics,
            "precision": precision,
            "max_grad_norm": max_grad_norm,
            "max_loss_ratio": max_loss_ratio,
            **of_controller(controller),
            **of_optimizer(optimizer),
            **flat("scheduler", rate.settings),
        }
        further = {
            **numbered("measurement", measurements),
            **{f"state {name}": held for name, held in state.items()},
        }
        first = world.rank == 0
        loop = TrainingLoop(
            model=model,
            train_data=train_data,
            ahead=ahead,
            after_epoch=AfterEpoch(
                model,
                eval_data,
                loss_fn,
                optimizer,
                measurements,
                watch,
                world,
                before=before_evaluation,
                after=after_evaluation,
            ),
            epochs=epochs,
            schedule_unit=schedule_unit,
            reference_batch_size=reference,
            norm_batch_size=norm_size,
            step=step,
            control=control,
            totals=totals,
            rate=rate,
            state=RunState(
                ModelState(model, optimizer, loss_fn),
                optimizer,
                stateful_parts(train_data, ahead, control, step, rate, totals) | further,
                watch,
                built,
                partial(step.follow, anew=True),
            ),
            record=Recorder(folder if first else None, sinks if first else ()),
            saver=Saver(checkpoint_examples, checkpoint_minutes, keep_checkpoints),
            policy=DivergencePolicy(on_divergence, max_rollbacks),
            watch=watch,
            world=world,
            decision=decision,
            run_dir=folder,
            show_progress=show_progress if first else False,
            norm_statistics=norm_statistics,
        )
        notices = [
            idle_adversary(controller, adversary),
            misfit(scheduler, schedule_unit, epochs, examples / reference),
            unheld_state(run_dir, optimizer, state),
        ]
        super().__init__(loop, config or {}, notices, controller, reference)
