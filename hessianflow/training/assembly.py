"""Assembly of the parts of a run from the arguments of the trainer."""

from pathlib import Path
from typing import Any

from hessianflow.interfaces import World
from hessianflow.runs import Recorder
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.checkpoint import flat, of_optimizer
from hessianflow.training.course import Course
from hessianflow.training.divergence import ExplosionRule
from hessianflow.training.epoch_end import EpochEnd
from hessianflow.training.keeping import Keeper
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.microbatch import microbatches
from hessianflow.training.optimizers import TrainedParameters
from hessianflow.training.reporting import Reporter, Reporting
from hessianflow.training.rollback import Guard
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState, numbered
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep
from hessianflow.training.task import Groups, Methods, Passes, Task
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals


def assemble(
    task: Task, methods: Methods, groups: Groups, run_dir: Path | None, world: World
) -> TrainingLoop:
    """Return the loop of a run."""
    decision = methods.first_decision(task.train_data)
    schedule = groups.schedule
    reference = schedule.reference_batch_size or decision.batch_size
    rate = LearningRate(task.optimizer, schedule.scheduler, schedule.unit, reference)
    step = _step(task, methods, groups.passes, reference, world)
    stopwatch = step.stopwatch
    course = Course(task.extent)
    reporter = _reporter(groups.reporting, course, run_dir, world)
    rule = ExplosionRule(groups.divergence.max_loss_ratio)
    totals = RunningTotals(stopwatch.device, stopwatch.totals(), rule)
    every_epoch = groups.after_epoch.curvature
    steering = Steering(decision, every_epoch, step, rate, totals, course, reporter)
    depth = methods.staleness
    device = stopwatch.device
    ahead = Lookahead(task.train_data, task.extent, depth, step.load, device, stopwatch)
    further = numbered("measurement", groups.after_epoch.measurements)
    further |= {f"state {name}": part for name, part in groups.checkpoints.state.items()}
    settings = _settings(task, methods.controller, groups, rate)
    state = RunState(step, steering, ahead, further, settings)
    keeper = Keeper(run_dir, state, Saver(groups.checkpoints))
    return TrainingLoop(
        model=task.model,
        norm_batch_size=step.accumulate.group_size,
        course=course,
        ahead=ahead,
        rate=rate,
        step=step,
        totals=totals,
        guard=Guard(groups.divergence, keeper),
        steering=steering,
        epoch_end=EpochEnd(groups.after_epoch, groups.passes.norm_statistics, keeper),
        keeper=keeper,
        reporter=reporter,
        world=world,
    )


def _step(
    task: Task, methods: Methods, passes: Passes, reference: int, world: World
) -> TrainingStep:
    """Return the part that takes a step, on the device of the model."""
    stopwatch = Stopwatch(next(task.model.parameters()).device)
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
        **task.extent.settings,
        "schedule_unit": rate.unit,
        "reference_batch_size": rate.reference_batch_size,
        "norm_batch_size": groups.passes.norm_group(rate.reference_batch_size),
        "norm_statistics": groups.passes.norm_statistics,
        "precision": groups.passes.precision,
        "max_grad_norm": groups.passes.max_grad_norm,
        "max_loss_ratio": groups.divergence.max_loss_ratio,
        **flat("controller", getattr(controller, "__dict__", {})),
        **of_optimizer(task.optimizer),
        **flat("scheduler", rate.settings),
    }


def _reporter(reporting: Reporting, course: Course, run_dir: Path | None, world: World) -> Reporter:
    """Return the part that reports; only that of rank 0 writes or shows anything."""
    if world.rank > 0:
        return Reporter(Recorder(None), course, show_progress=False)
    return Reporter(Recorder(run_dir, reporting.sinks), course, reporting.show_progress)
