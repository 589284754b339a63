"""The model and the data of a run, from a resolved configuration or from a run directory."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hessianflow.choices import split_for_twins
from hessianflow.config import RunConfig, TrainConfig, from_dict, option
from hessianflow.data import (
    AdaptiveBatches,
    Augmentation,
    DeviceBatches,
    ImageFolder,
    ImageSet,
    TextBatches,
    TextSet,
    load,
)
from hessianflow.data.datasets import FILE_SIDE, data_set
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.machine import computes_in_bf16, find_device
from hessianflow.memory import keep_freed_memory
from hessianflow.models import create
from hessianflow.models.catalogue import Variant
from hessianflow.models.decoder import DECODERS
from hessianflow.models.dropout import with_head_dropout
from hessianflow.models.external import is_external
from hessianflow.normalisation import is_split, merge_batch_norm
from hessianflow.resolve import resolve
from hessianflow.runs import checkpoints
from hessianflow.runs.documents import read_config
from hessianflow.runs.names import CHECKPOINTS, CONFIG, LAST
from hessianflow.runs.states import check_weights
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import Precision
from hessianflow.upgrade import upgrade

EVALUATION_BATCH = {"cpu": 128}
"""Test examples per forward pass by kind of device, 1000 on any other. This default is our choice:
the caches of a processor hold no more than 128."""

HELD_OUT_BLOCKS = 1024
"""Most held-out blocks of text that are evaluated by default, so that this takes less time than
training. Our choice."""


@dataclass(frozen=True)
class Parts:
    """A model and its data, before anything trains.

    Attributes:
        model: Model on its device.
        train: Training data, shuffled and augmented.
        test: Test data, plain and in the stored order.
        spread: Standard deviation per channel by which the pixels were divided. The size of an
            attack in pixel units is divided by it too.
    """

    model: nn.Module
    train: DeviceBatches | AdaptiveBatches | TextBatches
    test: DeviceBatches | AdaptiveBatches | TextBatches
    spread: tuple[float, ...]

    def first_tests(self, count: int) -> Batch:
        """Return the first `count` test examples, or all if there are fewer."""
        return self.test.examples(torch.arange(min(count, self.test.num_examples)))


def prepare(config: TrainConfig) -> RunConfig:
    """Return the resolved settings for this machine, as :func:`on_this_machine` sets it up."""
    return on_this_machine(resolve(config))


def on_this_machine(config: RunConfig) -> RunConfig:
    """Return the settings with the device and the precision of this machine.

    Threads, allocator and determinism are set for the whole process.
    """
    device = find_device(config.device)
    config = replace(config, precision=resolved_precision(config))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    if config.deterministic:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    return replace(config, device=str(device))


def build_parts(config: RunConfig) -> Parts:
    """Return the model, training and test batches of a resolved configuration, on its device."""
    device = find_device(config.device)
    train = _read(config, "train")
    test = _read(config, "test")
    for name in ("batch_size", "max_batch_size", "probe_examples"):
        size = getattr(config, name)
        if size is not None and size > len(train):
            raise HessianFlowError(
                f"{option(name)} {size} is larger than the {len(train)} training examples of"
                f" {config.data}"
            )
    part = -(-len(train) // (config.epoch_parts or 1))
    for name in ("batch_size", "max_batch_size"):
        if getattr(config, name) > part:
            raise HessianFlowError(
                f"{option(name)} {getattr(config, name)} is larger than the {part} examples of each"
                f" of the {config.epoch_parts} parts of a pass: lower it, or --epoch-parts"
            )
    # This is the stream of initialisation; the others have generators of their own.
    torch.manual_seed(config.seed)
    model = _model(config, train, device)
    shared: dict[str, Any] = {"device": device}
    spread: tuple[float, ...] = ()
    if not isinstance(train, TextSet):
        shared["num_workers"] = config.loader_workers
        shared["channels_last"] = bool(config.channels_last)
        spread = train.std
    return Parts(
        model,
        train.batches(config.batch_size, train=True, seed=config.seed, **shared),
        test.batches(EVALUATION_BATCH.get(device.type, 1000), train=False, **shared),
        spread,
    )


def _model(
    config: RunConfig, train: ImageSet | ImageFolder | TextSet, device: torch.device
) -> nn.Module:
    """Return the model of a run for examples as they are in `train`."""
    _check_kind(config)
    # A block of text counts as an image of one row without channels.
    side = train.input_shape[-1]
    channels = None
    variant: Variant = "cifar"
    if not isinstance(train, TextSet):
        channels = train.input_shape[0]
        if side > 64:
            variant = "imagenet"
    try:
        model = create(config.model, train.num_classes, side, variant, in_channels=channels)
    except HessianFlowError as error:
        raise HessianFlowError(f"--model: {error}") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise HessianFlowError(f"model {config.model!r} has no parameter to train: name another")
    model = split_for_twins(config, model).to(device)
    if config.dropouts is not None:
        model = with_head_dropout(model)
    if config.norm_batch_size == "ranks":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _check_kind(config: RunConfig) -> None:
    """Refuse one of our image models for text, and one of our decoders for images."""
    is_text = data_set(config.data).is_text
    if is_external(config.model) or is_text == (config.model in DECODERS):
        return
    known = ", ".join(DECODERS)
    if is_text:
        raise HessianFlowError(
            f"--model {config.model} takes images, but --data {config.data} is text: use one of"
            f" {known}"
        )
    raise HessianFlowError(
        f"--model {config.model} takes text, but --data {config.data} has images: use --data text"
        " or python"
    )


def load_config(run_dir: str | Path) -> RunConfig:
    """Return the resolved settings of a run directory.

    Raises:
        HessianFlowError: There is no run, or the command did not make it.
    """
    folder = Path(run_dir)
    path = folder / CONFIG
    if not path.is_file():
        raise HessianFlowError(f"{folder} is not a run directory: it holds no {CONFIG}")
    settings = read_config(folder).get("settings")
    if settings is None:
        raise HessianFlowError(
            f"{path} holds no settings: a run made from Python is continued from Python"
        )
    recorded = from_dict({**upgrade(settings), "run_dir": str(folder)}, str(path))
    try:
        return resolve(recorded)
    except HessianFlowError as error:
        raise HessianFlowError(f"{path}: {error}") from None


def find_checkpoint(path: str | Path) -> tuple[Path, Path]:
    """Return (run directory, checkpoint file) of a run directory or of a checkpoint inside one."""
    path = Path(path)
    if path.is_dir():
        return path, path / CHECKPOINTS / LAST
    if path.is_file() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, path
    raise HessianFlowError(f"{path} is neither a run directory nor a checkpoint inside one")


def load_parts(path: str | Path) -> tuple[RunConfig, Parts]:
    """Return the settings, and the data and trained model, of a run or of one of its checkpoints.

    A model with split batch normalisation keeps only the main set of statistics and parameters.
    """
    run_dir, file = find_checkpoint(path)
    config = on_this_machine(load_config(run_dir))
    state = checkpoints.load_checked(file, check_weights)
    parts = build_parts(config)
    checkpoint.load_model(parts.model, state["model"], str(file))
    if is_split(parts.model):
        parts = replace(parts, model=merge_batch_norm(parts.model))
    return config, parts


def resolved_precision(config: RunConfig) -> Precision:
    """Return the precision asked for; auto and None: bf16 if the device has it, else float32."""
    if config.precision is not None and config.precision != "auto":
        return config.precision
    if computes_in_bf16(find_device(config.device)):
        return "bf16"
    return "float32"


def _read(config: RunConfig, part: Literal["train", "test"]) -> ImageSet | ImageFolder | TextSet:
    kind = data_set(config.data)
    if config.data_dir is None and kind.is_text and kind.needs_files:
        raise HessianFlowError(
            f"--data {config.data} needs --data-dir: name a folder of text, a pattern or a file, or"
            " use --data python, which needs none"
        )
    if config.data_dir is None and kind.needs_files:
        raise HessianFlowError(
            f"--data {config.data} needs --data-dir, the folder of its official files "
            f"(`hessianflow data fetch {config.data} --data-dir DIR` gets them)"
        )
    images = load(
        config.data,
        config.data_dir,
        part,
        image_size=config.image_size or FILE_SIDE,
        block_length=config.block_length,
    )
    if not config.augment and not isinstance(images, TextSet):
        if isinstance(images, ImageSet):
            images = replace(images, augment=Augmentation())
        else:
            images = replace(images, augment=False)
    count = config.train_examples
    if part == "test":
        count = config.test_examples
        if count is None and isinstance(images, TextSet):
            count = min(HELD_OUT_BLOCKS, len(images))
    if count is None:
        return images
    if count > len(images):
        raise HessianFlowError(
            f"--{part}-examples {count} is more than the {len(images)} that the {part} set of"
            f" {config.data} has"
        )
    return images.take(count)
