"""From a resolved configuration to a dual-batch run."""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.build import (
    Parts,
    build_parts,
    build_recalibration,
    build_transform,
    on_this_machine,
    resolution_record,
    resolved_precision,
    tensorboard_sinks,
)
from hessianflow.choices import build_optimizer, build_stages
from hessianflow.config import RunConfig, to_dict
from hessianflow.control import (
    DualBatch,
    DualBatchPlan,
    Level,
    Stage,
    TimeModel,
    WorkerPlan,
    dual_batch_plan,
    fit_time_model,
    stage_at,
)
from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch.local_training import Course, FlatWeights, LocalTraining
from hessianflow.dual_batch.ray_server import Resources
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.trainer import DualBatchTask, DualBatchTrainer
from hessianflow.dual_batch.transports import OnRay, Simulated, Transport
from hessianflow.interfaces import HessianFlowError, RecordSink
from hessianflow.machine import find_device
from hessianflow.methods import KINDS, make
from hessianflow.resolve import schedule_of
from hessianflow.runs.documents import read_config
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.saving import Checkpoints, Saver

TIMED_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Batch sizes that are timed, as shares of the largest."""
WARM_STEPS, TIMED_STEPS = 2, 7
"""Steps left out, and steps timed, of each size; the median counts. All ours."""


@dataclass(frozen=True)
class Schedule:
    """Stages of a run, and a plan for each resolution.

    Attributes:
        stages: in order; one alone where the resolution never changes.
        times: by resolution.
        plans: by resolution.
    """

    stages: tuple[Stage, ...]
    times: Mapping[int, TimeModel]
    plans: Mapping[int, DualBatchPlan]

    def at(self, epoch: int) -> tuple[Stage, DualBatchPlan]:
        """Stage and plan of the epoch after `epoch` completed ones."""
        stage = stage_at(self.stages, epoch)
        return stage, self.plans[stage.level.resolution]

    def record(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "times": {str(resolution): asdict(model) for resolution, model in self.times.items()},
            "plans": {str(resolution): asdict(plan) for resolution, plan in self.plans.items()},
        }


def options_of(config: RunConfig) -> DualBatch:
    """Return the options of dual-batch that a run has."""
    options: DualBatch = make(KINDS["controller"], config.controller, batch_size=config.batch_size)
    return options


def build_dual_batch(config: RunConfig, sinks: Iterable[RecordSink] = ()) -> DualBatchTrainer:
    """Return a run for a prepared `config` (see :func:`hessianflow.build.prepare`).

    The time model is the one given, or the one that the run directory recorded, or it is measured
    here and now.

    Raises:
        HessianFlowError: as :func:`hessianflow.build.build_trainer`; a plan that cannot be; no Ray.
    """
    parts = build_parts(config)
    stages = all_stages(config, parts)
    build_transform(parts, stages)  # refuses a model whose head fixes the resolution
    schedule = plan_schedule(config, stages, parts.train.num_examples, _times(config, stages))
    workers = options_of(config).workers
    return DualBatchTrainer(
        DualBatchTask(
            parts.model,
            parts.test,
            nn.CrossEntropyLoss(),
            build_recalibration(config, parts),
            schedule.at,
            partial(rate_at, config),
            workers,
            config.epochs,
            parts.train.num_examples,
        ),
        _transport(config, parts, schedule),
        run_dir=config.run_dir,
        config={
            "settings": to_dict(config),
            "trainer": _summary(config, parts),
            **resolution_record(build_stages(config)),
            "dual_batch": schedule.record(),
        },
        sinks=[*sinks, *tensorboard_sinks(config)],
        saver=Saver(Checkpoints(keep=config.keep_checkpoints)),
    )


def all_stages(config: RunConfig, parts: Parts) -> tuple[Stage, ...]:
    """Return the stages of a run; without a schedule, one at full resolution."""
    full = Level(parts.train.sample(1)[0].shape[-1], config.batch_size)
    return build_stages(config) or (Stage(0, config.epochs, 0, full),)


def plan_schedule(
    config: RunConfig,
    stages: tuple[Stage, ...],
    num_examples: int,
    times: Mapping[int, TimeModel],
) -> Schedule:
    """Return a plan for each resolution.

    Raises:
        HessianFlowError: a plan that cannot be, or a batch larger than what a worker takes in an
            epoch.
    """
    options = options_of(config)
    plans = {}
    for level in {stage.level.resolution: stage.level for stage in stages}.values():
        time = times[level.resolution]
        plan = dual_batch_plan(
            options.workers,
            options.small_workers,
            num_examples,
            level.batch_size,
            time.slope,
            time.intercept,
            options.extra_time,
            min_small_batch_size=options.min_small_batch_size,
        )
        for worker in plan.workers:
            if worker.batch_size > worker.examples:
                raise HessianFlowError(
                    f"a batch of {worker.batch_size} is more than the {worker.examples} examples"
                    " that a worker takes in an epoch: use a --batch-size below"
                    f" {level.batch_size}, or fewer --workers"
                )
        plans[level.resolution] = plan
    return Schedule(stages, times, plans)


def rate_at(config: RunConfig, epoch: int) -> float:
    """Return the learning rate of an epoch; a warm-up goes in whole epochs, lr * (epoch + 1) /
    warm-up, as published."""
    warmup = min((epoch + 1) / config.warmup_epochs, 1.0) if config.warmup_epochs > 0 else 1.0
    return config.lr * warmup * float(schedule_of(config)(epoch))


def make_worker(config: RunConfig, schedule: Schedule, number: int) -> LocalTraining:
    """One worker with a model and data of its own, in a process of its own."""
    prepared = on_this_machine(config)
    parts = build_parts(prepared)  # the same weights in every process
    torch.manual_seed(config.seed + 1 + number)  # but dropout of its own
    return worker_of(prepared, parts, schedule, number)


def worker_of(config: RunConfig, parts: Parts, schedule: Schedule, number: int) -> LocalTraining:
    """One worker that trains `parts`, perhaps in turn with others."""

    def plan_at(epoch: int) -> WorkerPlan:
        return schedule.at(epoch)[1].workers[number]

    optimizer = build_optimizer(config, parts.model)
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    model = torch.compile(parts.model, dynamic=True) if config.compile else parts.model
    assert isinstance(model, nn.Module)
    if config.norm_batch_size == "ranks":
        raise HessianFlowError(
            "--norm-batch-size ranks: dual batches train apart, give a number of examples"
        )
    group = config.norm_batch_size or None
    return LocalTraining(
        parts.model,
        parts.train,
        optimizer,
        GradientAccumulator(
            model, nn.CrossEntropyLoss(), trained, (), resolved_precision(config), group
        ),
        build_transform(parts, build_stages(config)),
        Course(
            plan_at, partial(rate_at, config), number, options_of(config).workers, config.epochs
        ),
        microbatch_size=config.microbatch_size if isinstance(config.microbatch_size, int) else None,
        norm_batch_size=group,
    )


def make_server(weights: Any, plan: DualBatchPlan, synchrony: Any) -> ParameterServer:
    """Return the server of a plan; the factors are the same at every resolution."""
    factors = {number: worker.update_factor for number, worker in enumerate(plan.workers)}
    return ParameterServer(weights, factors, synchrony)


def time_worker(config: RunConfig, number: int) -> dict[int, list[tuple[int, float]]]:
    """(batch size, median seconds of a step) at each resolution, measured on a model of its own in
    this process."""
    prepared = on_this_machine(config)
    parts = build_parts(prepared)
    stages = all_stages(prepared, parts)
    worker = worker_of(prepared, parts, Schedule(stages, {}, {}), number)
    found: dict[int, list[tuple[int, float]]] = {}
    for stage in stages:
        if stage.level.resolution in found:
            continue
        sizes = sorted({max(1, round(share * stage.level.batch_size)) for share in TIMED_SHARES})
        timed = [
            (size, worker.measure(stage.start, size, WARM_STEPS + TIMED_STEPS)) for size in sizes
        ]
        found[stage.level.resolution] = [
            (size, statistics.median(s[WARM_STEPS:])) for size, s in timed
        ]
    return found


def _times(config: RunConfig, stages: Sequence[Stage]) -> dict[int, TimeModel]:
    """Return the time model at each resolution: given, recorded by the run that is resumed, or
    measured."""
    resolutions = sorted({stage.level.resolution for stage in stages})
    options = options_of(config)
    if options.slope is not None and options.intercept is not None:
        return _given_times(options.slope, options.intercept, resolutions)
    recorded = (
        {} if config.run_dir is None else read_config(Path(config.run_dir)).get("dual_batch", {})
    )
    if recorded:
        return _recorded_times(
            recorded.get("times", {}), resolutions, f"{config.run_dir}/config.json"
        )
    measured = (
        _measured_together(config)
        if options_of(config).server == "ray"
        else [time_worker(config, 0)]
    )
    models = {}
    for resolution in resolutions:
        sizes, seconds = zip(
            *(point for found in measured for point in found[resolution]), strict=True
        )
        try:
            models[resolution] = fit_time_model(sizes, seconds)
        except HessianFlowError as error:
            raise HessianFlowError(
                f"at {resolution} pixels {error}, or give --controller.slope and"
                " --controller.intercept"
            ) from None
    return models


def _recorded_times(
    times: Mapping[str, Mapping[str, Any]], resolutions: Sequence[int], source: str
) -> dict[int, TimeModel]:
    """Return the time models that a run recorded; `source` names the file."""
    models: dict[int, TimeModel] = {}
    for resolution in resolutions:
        try:
            models[resolution] = TimeModel(**times[str(resolution)])
        except (KeyError, TypeError):
            raise HessianFlowError(
                f"{source} holds no time model of {resolution} pixels: the file is damaged"
            ) from None
    return models


def _given_times(
    slope: Sequence[float], intercept: Sequence[float], resolutions: Sequence[int]
) -> dict[int, TimeModel]:
    for name, values in {"slope": slope, "intercept": intercept}.items():
        if len(values) != len(resolutions):
            raise HessianFlowError(
                f"--controller.{name} must hold one value for each of the resolutions"
                f" {list(resolutions)}, got {list(values)}"
            )
    lines = zip(resolutions, slope, intercept, strict=True)
    return {resolution: TimeModel(a, b) for resolution, a, b in lines}


def _measured_together(config: RunConfig) -> list[dict[int, list[tuple[int, float]]]]:
    """Return what every worker measures while all of them do: they share memory and caches."""
    ray = connect(config.ray_address)
    resources = _resources(config)
    task = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)(time_worker)
    measured: list[dict[int, list[tuple[int, float]]]] = ray.get(
        [task.remote(config, number) for number in range(options_of(config).workers)]
    )
    return measured


def _transport(config: RunConfig, parts: Parts, schedule: Schedule) -> Transport:
    plan = schedule.at(0)[1]
    server = partial(
        make_server, FlatWeights(parts.model).read(), plan, options_of(config).synchrony
    )
    if options_of(config).server == "ray":
        workers = options_of(config).workers
        return OnRay(
            server,
            partial(make_worker, config, schedule),
            workers,
            _resources(config),
            config.ray_address,
        )

    def seconds(worker: int, epoch: int) -> float:
        return schedule.at(epoch)[1].workers[worker].seconds

    return Simulated(server, partial(worker_of, config, parts, schedule), seconds)


def _resources(config: RunConfig) -> Resources:
    """Return a share of the processors and GPUs of this machine; a cluster gives every worker at
    least that."""
    workers = options_of(config).workers
    gpus = torch.cuda.device_count() if find_device(config.device).type == "cuda" else 0
    return Resources(min(1.0, (os.cpu_count() or 1) / workers), min(1.0, gpus / workers))


def _summary(config: RunConfig, parts: Parts) -> dict[str, Any]:
    return {
        "model": type(parts.model).__name__,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "controller": config.controller.name,
        "epochs": config.epochs,
        "examples_per_epoch": parts.train.num_examples,
        "precision": config.precision,
        "device": config.device,
    }
