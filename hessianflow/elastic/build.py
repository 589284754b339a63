"""The module that makes an elastic run from a resolved configuration."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from hessianflow.build import build_trainer, tensorboard_sinks
from hessianflow.config import RunConfig, to_dict
from hessianflow.distributed.ray_session import connect
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.elastic.trainer import ElasticTrainer
from hessianflow.interfaces import HessianFlowError, RecordSink, World
from hessianflow.parts import on_this_machine
from hessianflow.training import AdaptiveBatchTrainer


def build_elastic(config: RunConfig, sinks: Iterable[RecordSink] = ()) -> ElasticTrainer:
    """Return the trainer of an elastic run, connected to Ray.

    Each worker asks for `threads` processors (1 by default), and for a GPU if the run uses GPUs.

    Raises:
        HessianFlowError: Ray cannot be reached, or the run has no directory.
    """
    if config.run_dir is None:
        raise HessianFlowError("an elastic run needs --run-dir, the folder of its records")
    gpus = connect(config.ray_address).cluster_resources().get("GPU", 0.0)
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)
    device = "cpu"
    if on_gpu:
        device = "cuda"
    threads = config.threads or 1
    settings = ElasticSettings(
        config.min_workers or 1,
        config.max_workers or 8,
        num_cpus=threads,
        num_gpus=float(on_gpu),
        address=config.ray_address,
    )
    own = replace(config, run_dir=None, tensorboard=False, device=device, threads=threads)
    return ElasticTrainer(
        partial(make_trainer, own),
        settings,
        run_dir=config.run_dir,
        config={"settings": to_dict(config)},
        sinks=[*sinks, *tensorboard_sinks(config)],
        keep_checkpoints=config.keep_checkpoints,
    )


def make_trainer(config: RunConfig, world: World) -> AdaptiveBatchTrainer:
    """Return the trainer of one rank, in its own process."""
    return build_trainer(on_this_machine(config), world=world)
