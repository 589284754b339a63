"""Puts the parts of a run together; what they were made from, the trainer has checked."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import (
    Adversary,
    BatchTransform,
    Decision,
    GradientObserver,
    LossFn,
    ResizableBatches,
    World,
)
from hessianflow.runs import Recorder
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.after_epoch import Evaluator
from hessianflow.training.control_point import ControlPoint
from hessianflow.training.course import Course
from hessianflow.training.divergence import Divergence
from hessianflow.training.epoch_end import EpochEnd
from hessianflow.training.explosion import ExplosionRule
from hessianflow.training.keeping import Keeper
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.microbatch import microbatches
from hessianflow.training.model_state import ModelState
from hessianflow.training.parameters import TrainedParameters
from hessianflow.training.passes import Passes
from hessianflow.training.reporting import Reporter, Reporting
from hessianflow.training.rollback import Guard
from hessianflow.training.saving import Checkpoints, Saver
from hessianflow.training.settings import flat, of_controller, of_optimizer
from hessianflow.training.state import Component, RunState, components, numbered
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals


def assemble_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    observers: Sequence[GradientObserver],
    adversary: Adversary | None,
    transform: BatchTransform | None,
    passes: Passes,
    reference_batch_size: int,
    num_examples: int,
    world: World,
) -> TrainingStep:
    """Return what takes a step, on the device that the model is on."""
    stopwatch = Stopwatch(next(model.parameters()).device)
    microbatch, paired = microbatches(
        model, world, passes.microbatch_size, reference_batch_size, num_examples
    )
    trained = TrainedParameters(model, optimizer)
    accumulate = GradientAccumulator(
        model,
        loss_fn,
        trained.current,
        observers,
        passes.precision,
        passes.norm_group(reference_batch_size),
        world,
        paired,
    )
    return TrainingStep(
        model,
        optimizer,
        accumulate,
        microbatch,
        adversary,
        transform,
        stopwatch,
        stopwatch.device,
        world,
        trained,
        passes.max_grad_norm,
    )


def assemble_loop(
    step: TrainingStep,
    control: ControlPoint,
    rate: LearningRate,
    train_data: ResizableBatches,
    decision: Decision,
    evaluator: Evaluator,
    epochs: int,
    run_dir: Path | None,
    passes: Passes,
    checkpoints: Checkpoints,
    divergence: Divergence,
    reporting: Reporting,
    built: Mapping[str, Any],
) -> TrainingLoop:
    """Return the loop around a step; rank 0 alone writes and shows anything."""
    model, world, stopwatch = step.model, step.world, step.stopwatch
    is_first = world.rank == 0
    adversary = step.adversary
    depth = 0 if adversary is None else adversary.staleness
    ahead = Lookahead(train_data, depth, step.load, stopwatch.device, stopwatch)
    rule = ExplosionRule(divergence.max_loss_ratio)
    totals = RunningTotals(stopwatch.device, stopwatch.totals(), rule)
    course = Course(train_data, epochs)
    record = Recorder(run_dir, reporting.sinks) if is_first else Recorder(None)
    reporter = Reporter(record, course, reporting.show_progress if is_first else False)
    steering = Steering(
        decision, control, train_data, rate, totals, course, reporter, adversary is not None
    )
    state = RunState(
        ModelState(model, step.optimizer, step.accumulate.loss_fn),
        step.optimizer,
        [
            *components(train_data, ahead, control, step, rate, totals),
            *numbered("measurement", evaluator.settings.measurements),
            *(Component(f"state {name}", held) for name, held in checkpoints.state.items()),
        ],
        stopwatch,
        built,
        partial(step.follow, anew=True),
        course,
    )
    keeper = Keeper(
        run_dir, model, state, Saver(checkpoints), record, course, ahead, steering, world
    )
    guard = Guard(
        divergence, model, lambda: step.trained.current, keeper, reporter, stopwatch, world
    )
    statistics = passes.norm_statistics
    epoch_end = EpochEnd(evaluator, totals, rate, keeper, reporter, step.microbatch, statistics)
    return TrainingLoop(
        model,
        step.accumulate.group_size,
        course,
        ahead,
        rate,
        step,
        totals,
        guard,
        steering,
        epoch_end,
        keeper,
        reporter,
        world,
    )


def settings_of(
    step: TrainingStep,
    control: ControlPoint,
    rate: LearningRate,
    epochs: int,
    reference_batch_size: int,
    passes: Passes,
    divergence: Divergence,
) -> dict[str, Any]:
    """Return the settings that every checkpoint holds, to be compared when a run is resumed."""
    return {
        "epochs": epochs,
        "schedule_unit": rate.unit,
        "reference_batch_size": reference_batch_size,
        "norm_batch_size": step.accumulate.group_size,
        "norm_statistics": passes.norm_statistics,
        "precision": passes.precision,
        "max_grad_norm": passes.max_grad_norm,
        "max_loss_ratio": divergence.max_loss_ratio,
        **of_controller(control.controller),
        **of_optimizer(step.optimizer),
        **flat("scheduler", rate.settings),
    }
