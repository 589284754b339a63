"""Assembly of the parts of a run from the arguments of the trainer."""

from functools import partial
from pathlib import Path
from typing import Any

from hessianflow.interfaces import World
from hessianflow.runs import Recorder
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.checkpoint import ModelState, flat, of_controller, of_optimizer
from hessianflow.training.course import Course
from hessianflow.training.divergence import ExplosionRule
from hessianflow.training.epoch_end import EpochEnd
from hessianflow.training.keeping import Keeper
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.microbatch import microbatches
from hessianflow.training.parameters import TrainedParameters
from hessianflow.training.reporting import Reporter, Reporting
from hessianflow.training.rollback import Guard
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState, components, numbered
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep
from hessianflow.training.task import Groups, Methods, Task
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals


def assemble(
    task: Task, methods: Methods, groups: Groups, run_dir: Path | None, world: World
) -> TrainingLoop:
    """Return the loop of a run."""
    decision = methods.first_decision(task.train_data)
    reference = groups.schedule.reference_batch_size or decision.batch_size
    schedule = groups.schedule
    rate = LearningRate(task.optimizer, schedule.scheduler, schedule.unit, reference)
    step = _step(task, methods, groups, reference, world)
    stopwatch = step.stopwatch
    course = Course(task.train_data, task.epochs)
    reporter = _reporter(groups.reporting, course, run_dir, world)
    rule = ExplosionRule(groups.divergence.max_loss_ratio)
    totals = RunningTotals(stopwatch.device, stopwatch.totals(), rule)
    steering = Steering(
        decision,
        methods,
        groups.after_epoch.curvature,
        task.train_data,
        rate,
        totals,
        course,
        reporter,
        stopwatch,
        world,
    )
    keeper = _keeper(task, methods, groups, step, steering, run_dir)
    return _loop(task, groups, step, keeper)


def _step(
    task: Task, methods: Methods, groups: Groups, reference: int, world: World
) -> TrainingStep:
    """Return the part that takes a step, on the device of the model."""
    passes = groups.passes
    stopwatch = Stopwatch(task.device)
    examples = task.train_data.num_examples
    microbatch, paired = microbatches(
        task.model, world, passes.microbatch_size, reference, examples
    )
    trained = TrainedParameters(task.model, task.optimizer)
    accumulate = GradientAccumulator(
        task.model,
        task.loss_fn,
        trained.current,
        methods.observers,
        passes.precision,
        passes.norm_group(reference),
        world,
        paired,
    )
    limit = passes.max_grad_norm
    return TrainingStep(task, methods, accumulate, microbatch, stopwatch, trained, limit)


def _settings(task: Task, controller: object, groups: Groups, rate: LearningRate) -> dict[str, Any]:
    """Return the settings that every checkpoint holds, to be compared when a run is resumed."""
    return {
        "epochs": task.epochs,
        "schedule_unit": rate.unit,
        "reference_batch_size": rate.reference_batch_size,
        "norm_batch_size": groups.passes.norm_group(rate.reference_batch_size),
        "norm_statistics": groups.passes.norm_statistics,
        "precision": groups.passes.precision,
        "max_grad_norm": groups.passes.max_grad_norm,
        "max_loss_ratio": groups.divergence.max_loss_ratio,
        **of_controller(controller),
        **of_optimizer(task.optimizer),
        **flat("scheduler", rate.settings),
    }


def _reporter(reporting: Reporting, course: Course, run_dir: Path | None, world: World) -> Reporter:
    """Return the part that reports; only that of rank 0 writes or shows anything."""
    if world.rank > 0:
        return Reporter(Recorder(None), course, show_progress=False)
    return Reporter(Recorder(run_dir, reporting.sinks), course, reporting.show_progress)


def _keeper(
    task: Task,
    methods: Methods,
    groups: Groups,
    step: TrainingStep,
    steering: Steering,
    run_dir: Path | None,
) -> Keeper:
    """Return the part that keeps the state of the run; components are put back in this order."""
    stopwatch = step.stopwatch
    ahead = Lookahead(task.train_data, methods.staleness, step.load, stopwatch.device, stopwatch)
    held = {f"state {name}": part for name, part in groups.checkpoints.state.items()}
    state = RunState(
        ModelState(task.model, task.optimizer, task.loss_fn),
        task.optimizer,
        {
            **components(ahead, step, steering),
            **numbered("measurement", groups.after_epoch.measurements),
            **held,
        },
        stopwatch,
        _settings(task, methods.controller, groups, steering.rate),
        partial(step.follow, replan=True),
        steering.course,
    )
    saver = Saver(groups.checkpoints)
    return Keeper(run_dir, task.model, state, saver, ahead, steering, step.world)


def _loop(task: Task, groups: Groups, step: TrainingStep, keeper: Keeper) -> TrainingLoop:
    """Return the loop around a step."""
    steering = keeper.steering
    statistics = groups.passes.norm_statistics
    return TrainingLoop(
        model=task.model,
        norm_batch_size=step.accumulate.group_size,
        course=steering.course,
        ahead=keeper.ahead,
        rate=steering.rate,
        step=step,
        totals=steering.totals,
        guard=Guard(groups.divergence, step.trained, keeper, step.stopwatch),
        steering=steering,
        epoch_end=EpochEnd(task, groups.after_epoch, keeper, step.microbatch, statistics),
        keeper=keeper,
        reporter=steering.reporter,
        world=step.world,
    )
