"""The module that joins the parts: it makes a trainer from a resolved configuration."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.batches import split
from hessianflow.choices import (
    build_adversary,
    build_controller,
    build_observers,
    build_optimizer,
    build_scheduler,
    build_stages,
    microbatch_default,
)
from hessianflow.config import RunConfig, to_dict
from hessianflow.control import Stage, stage_at
from hessianflow.distributed.curvature import sharded
from hessianflow.interfaces import GradientObserver, HessianFlowError, RecordSink, World
from hessianflow.measurements import build_measurements, build_probe
from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.parts import Parts, build_parts, resolved_precision
from hessianflow.runs import TensorBoardSink
from hessianflow.runs.names import TENSORBOARD
from hessianflow.training import (
    AdaptiveBatchTrainer,
    AfterEpoch,
    Checkpoints,
    Divergence,
    Every,
    Passes,
    Reporting,
    Schedule,
)
from hessianflow.training.progressive import ProgressiveResize, check_resolutions
from hessianflow.training.world import LocalWorld

RECALIBRATION_EXAMPLES = 1024
"""Training examples on which the statistics of normalisation are measured before an evaluation.
This default is our choice."""


def build_trainer(
    config: RunConfig, sinks: Iterable[RecordSink] = (), world: World | None = None
) -> AdaptiveBatchTrainer:
    """Return a trainer for a run, whose records go to `sinks` besides the run directory.

    Without a `world` it trains in one process.

    Raises:
        HessianFlowError: Data are missing or damaged, a name is unknown, or sizes do not fit.
    """
    world = world or LocalWorld()
    parts = build_parts(config)
    optimizer = build_optimizer(config, parts.model)
    controller = build_controller(config)
    observers = build_observers(controller, optimizer)
    examples = parts.train.num_examples
    scheduler, unit = build_scheduler(config, optimizer, examples)
    stages = build_stages(config)
    transform = build_transform(parts, stages)
    recalibration = None
    if transform is not None:
        recalibration = build_recalibration(config, parts)
    return AdaptiveBatchTrainer(
        compiled(config, parts.model),
        parts.train,
        parts.test,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        controller=controller,
        adversary=build_adversary(config, parts.train, parts.spread),
        epochs=config.epochs,
        every=part_of_an_epoch(config, examples),
        probe=build_probe(config, parts, transform, sharded(world), optimizer),
        observers=observers,
        transform=transform,
        schedule=Schedule(scheduler, unit, config.batch_size),
        passes=_passes(config, observers),
        checkpoints=Checkpoints(
            config.checkpoint_examples, config.checkpoint_minutes, config.keep_checkpoints
        ),
        divergence=Divergence(config.on_divergence, config.max_rollbacks),
        after_epoch=AfterEpoch(
            curvature=config.curvature != "needed",
            before_evaluation=recalibration,
            measurements=build_measurements(config, parts),
        ),
        run_dir=config.run_dir,
        reporting=Reporting(
            sinks=[*sinks, *tensorboard_sinks(config)],
            config={"settings": to_dict(config), **resolution_record(stages)},
        ),
        world=world,
    )


def part_of_an_epoch(config: RunConfig, examples: int) -> Every | None:
    """Return the length of each part of a pass over `examples`; None if it is not divided."""
    if config.epoch_parts is None or config.epoch_parts == 1:
        return None
    return Every(examples=-(-examples // config.epoch_parts))


def _passes(config: RunConfig, observers: list[GradientObserver]) -> Passes:
    """Return the sizes and the precision of the passes through the network."""
    norm_batch_size = config.norm_batch_size
    if norm_batch_size == "ranks":  # SyncBatchNorm gathers the batches of all ranks by itself
        norm_batch_size = 0
    return Passes(
        microbatch_size=config.microbatch_size or microbatch_default(config, observers),
        norm_batch_size=norm_batch_size,
        norm_statistics=config.norm_statistics,
        precision=resolved_precision(config),
    )


def compiled(config: RunConfig, model: nn.Module) -> nn.Module:
    """Return the model, compiled for batches of any size if the run asks for that."""
    if not config.compile:
        return model
    faster = torch.compile(model, dynamic=True)
    assert isinstance(faster, nn.Module)
    return faster


def resolution_record(stages: tuple[Stage, ...]) -> dict[str, Any]:
    """Return the stages as config.json holds them; {} if the resolution never changes."""
    if not stages:
        return {}
    return {"resolution_stages": [asdict(stage) for stage in stages]}


def build_transform(parts: Parts, stages: tuple[Stage, ...]) -> ProgressiveResize | None:
    """Return the transform that resizes batches; None if the resolution never changes.

    A model that takes images of one size only is refused.
    """
    if not stages:
        return None
    image, _ = parts.train.sample(1)
    check_resolutions(parts.model, image, sorted({stage.level.resolution for stage in stages}))
    return ProgressiveResize(parts.model, lambda epoch: stage_at(stages, epoch).level)


def build_recalibration(config: RunConfig, parts: Parts) -> Callable[[], None]:
    """Return a function that measures the statistics of normalisation at full resolution."""
    count = min(RECALIBRATION_EXAMPLES, parts.train.num_examples)
    sample = list(split(parts.train.sample(count, config.seed), config.batch_size))
    return partial(recalibrate, parts.model, sample)


def tensorboard_sinks(config: RunConfig) -> list[RecordSink]:
    """Return the sink that writes TensorBoard files, if the run asks for them."""
    if not config.tensorboard:
        return []
    if config.run_dir is None:
        raise HessianFlowError("--tensorboard needs --run-dir: the folder its files go to")
    return [TensorBoardSink(Path(config.run_dir) / TENSORBOARD)]
