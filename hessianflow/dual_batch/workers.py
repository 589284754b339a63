"""The workers and the server of a dual-batch run, and the plan that they follow."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hessianflow.build import (
    Parts,
    build_parts,
    build_transform,
    compiled,
    on_this_machine,
    resolved_precision,
)
from hessianflow.choices import build_optimizer, build_stages
from hessianflow.config import RunConfig
from hessianflow.control import (
    DualBatch,
    DualBatchPlan,
    Level,
    Stage,
    TimeModel,
    WorkerPlan,
    stage_at,
)
from hessianflow.dual_batch.local_training import Course, LocalTraining
from hessianflow.dual_batch.ray_server import Resources
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.interfaces import HessianFlowError
from hessianflow.machine import find_device
from hessianflow.methods import KINDS, make
from hessianflow.resolve import schedule_of
from hessianflow.training.accumulate import GradientAccumulator


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
    microbatch = config.microbatch_size
    if not isinstance(microbatch, int):
        microbatch = None
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
