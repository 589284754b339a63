"""The workers and the server of a dual-batch run, the plan that they follow, and their step times.

Times are given, recorded by the run that is resumed, or measured.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.build import build_transform, compiled
from hessianflow.choices import build_optimizer, build_stages
from hessianflow.config import RunConfig
from hessianflow.control import (
    DualBatch,
    DualBatchPlan,
    Level,
    Stage,
    TimeModel,
    WorkerPlan,
    fit_time_model,
    stage_at,
)
from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch.local_training import Course, LocalTraining
from hessianflow.dual_batch.ray_server import Resources
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.interfaces import HessianFlowError
from hessianflow.machine import find_device
from hessianflow.methods import KINDS, make
from hessianflow.parts import Parts, build_parts, on_this_machine, resolved_precision
from hessianflow.resolve import schedule_of
from hessianflow.runs.documents import read_config
from hessianflow.training.accumulate import GradientAccumulator

TIMED_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Batch sizes that are timed, as shares of the largest. This default is our choice."""
WARM_STEPS = 2
"""Steps of each size before the timed ones. This default is our choice."""
TIMED_STEPS = 7
"""Steps of each size whose median counts. This default is our choice."""


@dataclass(frozen=True)
class StagePlan:
    """The stages of a run, and a plan for each resolution.

    Attributes:
        stages: Stages in order; a single one if the resolution never changes.
        times, plans: Time model of a step, and plan, by resolution.
    """

    stages: tuple[Stage, ...]
    times: Mapping[int, TimeModel]
    plans: Mapping[int, DualBatchPlan]

    def at(self, epoch: int) -> tuple[Stage, DualBatchPlan]:
        """Return the stage and the plan of the epoch after `epoch` completed ones."""
        stage = stage_at(self.stages, epoch)
        return stage, self.plans[stage.level.resolution]

    def record(self) -> dict[str, Any]:
        """Return the time models and plans in the form of config.json."""
        return {
            "times": {str(resolution): asdict(model) for resolution, model in self.times.items()},
            "plans": {str(resolution): asdict(plan) for resolution, plan in self.plans.items()},
        }


def options_of(config: RunConfig) -> DualBatch:
    """Return the options of the dual-batch method of a run."""
    options: DualBatch = make(KINDS["controller"], config.controller, batch_size=config.batch_size)
    return options


def all_stages(config: RunConfig, parts: Parts) -> tuple[Stage, ...]:
    """Return the stages of a run; one at full resolution if the resolution never changes."""
    full = Level(parts.train.sample(1)[0].shape[-1], config.batch_size)
    return build_stages(config) or (Stage(0, config.epochs, 0, full),)


def rate_at(config: RunConfig, epoch: int) -> float:
    """Return the rate of an epoch; warm-up is lr * (epoch + 1) / warmup_epochs, as published."""
    warmup = 1.0
    if config.warmup_epochs > 0:
        warmup = min((epoch + 1) / config.warmup_epochs, 1.0)
    return config.lr * warmup * float(schedule_of(config)(epoch))


def make_worker(config: RunConfig, schedule: StagePlan, number: int) -> LocalTraining:
    """Return a worker with its own model and data, for a process of its own."""
    prepared = on_this_machine(config)
    # All processes start from the same weights, but each has its own stream of dropout.
    parts = build_parts(prepared)
    torch.manual_seed(config.seed + 1 + number)
    return worker_of(prepared, parts, schedule, number)


def worker_of(config: RunConfig, parts: Parts, schedule: StagePlan, number: int) -> LocalTraining:
    """Return a worker that trains `parts`, perhaps in turn with others."""

    def plan_at(epoch: int) -> WorkerPlan:
        return schedule.at(epoch)[1].workers[number]

    optimizer = build_optimizer(config, parts.model)
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    model = compiled(config, parts.model)
    if config.norm_batch_size == "ranks":
        raise HessianFlowError(
            "--norm-batch-size ranks: dual batches train apart, give a number of examples"
        )
    group = config.norm_batch_size or None
    microbatch = config.microbatch_size if isinstance(config.microbatch_size, int) else None
    loss = nn.CrossEntropyLoss()
    workers = options_of(config).workers
    return LocalTraining(
        parts.model,
        parts.train,
        optimizer,
        GradientAccumulator(model, loss, trained, (), resolved_precision(config), group),
        build_transform(parts, build_stages(config)),
        Course(plan_at, partial(rate_at, config), number, workers, config.epochs),
        microbatch_size=microbatch,
        norm_batch_size=group,
    )


def make_server(weights: Any, plan: DualBatchPlan, synchrony: Any) -> ParameterServer:
    """Return the server of a plan, whose update factors are the same at every resolution."""
    factors = {number: worker.update_factor for number, worker in enumerate(plan.workers)}
    return ParameterServer(weights, factors, synchrony)


def resources_of(config: RunConfig) -> Resources:
    """Return the share of this machine that each worker asks for; a cluster gives at least that."""
    workers = options_of(config).workers
    gpus = 0
    if find_device(config.device).type == "cuda":
        gpus = torch.cuda.device_count()
    return Resources(min(1.0, (os.cpu_count() or 1) / workers), min(1.0, gpus / workers))


def time_worker(config: RunConfig, number: int) -> dict[int, list[tuple[int, float]]]:
    """Return (batch size, median seconds of a step) by resolution, of a model of its own here."""
    prepared = on_this_machine(config)
    parts = build_parts(prepared)
    stages = all_stages(prepared, parts)
    worker = worker_of(prepared, parts, StagePlan(stages, {}, {}), number)
    points: dict[int, list[tuple[int, float]]] = {}
    for stage in stages:
        own = points.setdefault(stage.level.resolution, [])
        if own:
            continue
        sizes = {max(1, round(share * stage.level.batch_size)) for share in TIMED_SHARES}
        for size in sorted(sizes):
            seconds = worker.measure(stage.start, size, WARM_STEPS + TIMED_STEPS)
            own.append((size, statistics.median(seconds[WARM_STEPS:])))
    return points


def times_of(config: RunConfig, stages: Sequence[Stage]) -> dict[int, TimeModel]:
    """Return the time model at each resolution, which is given, recorded or measured.

    Raises:
        HessianFlowError: Given times do not fit the resolutions, recorded ones are damaged, or
            measured ones make no line.
    """
    resolutions = sorted({stage.level.resolution for stage in stages})
    options = options_of(config)
    if options.slope is not None and options.intercept is not None:
        return _given_times(options.slope, options.intercept, resolutions)
    if config.run_dir is not None:
        recorded = read_config(Path(config.run_dir)).get("dual_batch")
        if recorded:
            source = f"{config.run_dir}/config.json"
            return _recorded_times(recorded.get("times", {}), resolutions, source)
    return _measured_times(config, resolutions)


def _measured_times(config: RunConfig, resolutions: Sequence[int]) -> dict[int, TimeModel]:
    """Return the time models of steps that are timed now."""
    if options_of(config).server == "ray":
        by_worker = _measured_together(config)
    else:
        by_worker = [time_worker(config, 0)]
    models = {}
    for resolution in resolutions:
        points = [point for of_worker in by_worker for point in of_worker[resolution]]
        sizes, seconds = zip(*points, strict=True)
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
    """Return the time models that a run recorded; errors name the file by `source`."""
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
    """Return the times that each worker measures while all of them share memory and caches."""
    ray = connect(config.ray_address)
    resources = resources_of(config)
    task = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)(time_worker)
    measured: list[dict[int, list[tuple[int, float]]]] = ray.get(
        [task.remote(config, number) for number in range(options_of(config).workers)]
    )
    return measured
