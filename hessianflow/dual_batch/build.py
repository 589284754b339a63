"""The module that makes a dual-batch run from a resolved configuration."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from hessianflow.build import (
    build_recalibration,
    build_transform,
    resolution_record,
    tensorboard_sinks,
)
from hessianflow.choices import build_stages
from hessianflow.config import RunConfig, to_dict
from hessianflow.control import Stage, TimeModel, dual_batch_plan
from hessianflow.dual_batch.local_training import FlatWeights
from hessianflow.dual_batch.trainer import DualBatchTask, DualBatchTrainer
from hessianflow.dual_batch.transports import OnRay, Simulated, Transport
from hessianflow.dual_batch.workers import (
    StagePlan,
    all_stages,
    make_server,
    make_worker,
    options_of,
    rate_at,
    resources_of,
    times_of,
    worker_of,
)
from hessianflow.interfaces import HessianFlowError, RecordSink
from hessianflow.parts import Parts, build_parts
from hessianflow.training.saving import Checkpoints, Saver


def build_dual_batch(config: RunConfig, sinks: Iterable[RecordSink] = ()) -> DualBatchTrainer:
    """Return the trainer for a prepared `config` (see :func:`hessianflow.parts.prepare`).

    Step times are given, or recorded in the run directory, or else measured here.

    Raises:
        HessianFlowError: As :func:`hessianflow.build.build_trainer`; or no plan meets the options,
            or Ray cannot be reached.
    """
    parts = build_parts(config)
    stages = all_stages(config, parts)
    build_transform(parts, stages)  # this refuses a model whose head fixes the resolution
    schedule = plan_schedule(config, stages, parts.train.num_examples, times_of(config, stages))
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


def plan_schedule(
    config: RunConfig,
    stages: tuple[Stage, ...],
    num_examples: int,
    times: Mapping[int, TimeModel],
) -> StagePlan:
    """Return a plan for each resolution.

    Raises:
        HessianFlowError: There is none, or a batch exceeds the examples of a worker in an epoch.
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
    return StagePlan(stages, times, plans)


def _transport(config: RunConfig, parts: Parts, schedule: StagePlan) -> Transport:
    options = options_of(config)
    plan = schedule.at(0)[1]
    server = partial(make_server, FlatWeights(parts.model).read(), plan, options.synchrony)
    if options.server == "ray":
        worker = partial(make_worker, config, schedule)
        resources = resources_of(config)
        return OnRay(server, worker, options.workers, resources, config.ray_address)

    def seconds(worker: int, epoch: int) -> float:
        return schedule.at(epoch)[1].workers[worker].seconds

    return Simulated(server, partial(worker_of, config, parts, schedule), seconds)


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
