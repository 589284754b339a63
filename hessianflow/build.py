"""The only place that joins the parts: from a resolved configuration to a trainer."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.adversarial import FGSM, PGD
from hessianflow.config import TrainConfig, from_dict, resolve, to_dict
from hessianflow.control import ABSA, AdaBatch, FixedBatch, GrowInsteadOfDecay, Warmup
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import DeviceBatches, ImageSet, load
from hessianflow.interfaces import Adversary, BatchController, HessianFlowError, RecordSink
from hessianflow.models import create
from hessianflow.training import AdaptiveBatchTrainer, checkpoint
from hessianflow.training.record import CONFIG, read_json

T = TypeVar("T")

EVALUATION_BATCH = 1000
_BUNDLED = ("digits", "fake")


@dataclass(frozen=True)
class Parts:
    """A model and its data, before anything trains."""

    model: nn.Module
    train: DeviceBatches
    test: DeviceBatches
    spread: tuple[float, ...]
    """Standard deviation per channel that the inputs were divided by: an eps in pixel units is divided by it too."""


def build_trainer(config: TrainConfig, sinks: Iterable[RecordSink] = ()) -> AdaptiveBatchTrainer:
    """A trainer for `config`, which is resolved first.

    Raises:
        HessianFlowError: data that is missing or damaged, a name that is unknown, sizes that do not fit.
    """
    config = resolve(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    parts = build_parts(config)
    optimizer = build_optimizer(config, parts.model)
    loss_fn = nn.CrossEntropyLoss()
    return AdaptiveBatchTrainer(
        parts.model,
        parts.train,
        parts.test,
        optimizer=optimizer,
        loss_fn=loss_fn,
        controller=build_controller(config),
        adversary=build_adversary(config, parts),
        epochs=_given(config.epochs),
        scheduler=build_scheduler(config, optimizer),
        probe=build_probe(config, parts),
        curvature="needed" if config.curvature == "needed" else "epoch",
        microbatch_size=config.microbatch_size,
        precision=config.precision,
        run_dir=config.run_dir,
        config={"settings": to_dict(config)},
        sinks=sinks,
        checkpoint_examples=config.checkpoint_examples,
    )


def build_parts(config: TrainConfig) -> Parts:
    """Model, training and test batches of a resolved configuration, on its device."""
    device = find_device(config.device)
    if config.data_dir is None and config.data not in _BUNDLED:
        raise HessianFlowError(
            f"--data {config.data} needs --data-dir, the folder of its official files "
            f"(`hessianflow data fetch {config.data} DIR` gets them)"
        )
    train, test = (load(config.data, config.data_dir, split) for split in ("train", "test"))
    batch, cap = _given(config.batch_size), _given(config.max_batch_size)
    for name, size in (("--batch-size", batch), ("--max-batch-size", cap)):
        if size > len(train):
            raise HessianFlowError(f"{name} {size} is larger than the {len(train)} training examples of {config.data}")
    torch.manual_seed(config.seed)  # the stream of initialisation; all others have generators of their own
    channels, side, _ = train.input_shape
    model = create(config.model or "", train.num_classes, side, in_channels=channels)
    shared = {"device": device, "mean": train.mean, "std": train.std, "value_scale": train.value_scale}
    return Parts(
        model.to(device),
        _batches(train, batch, seed=config.seed, augment=train.augment if config.augment else None, **shared),
        _batches(test, EVALUATION_BATCH, shuffle=False, **shared),
        train.std,
    )


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer by name, over all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = _given(config.lr), config.weight_decay
    if config.optimizer == "sgd":
        return SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adam":
        return Adam(parameters, lr=rate, weight_decay=decay)
    return AdamW(parameters, lr=rate, weight_decay=decay)


def build_scheduler(config: TrainConfig, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule below the controller's factor, one step an epoch."""
    epochs = _given(config.epochs)
    if config.schedule == "multistep":
        milestones = list(config.milestones or ())
        return lr_scheduler.MultiStepLR(optimizer, milestones, gamma=config.lr_decay)
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if config.schedule == "polynomial":
        return lr_scheduler.PolynomialLR(optimizer, total_iters=epochs, power=2.0)
    return None


def build_controller(config: TrainConfig) -> BatchController:
    """The controller by name."""
    batch, cap = _given(config.batch_size), _given(config.max_batch_size)
    share = 0.0 if config.adversary == "none" else config.adversarial_share
    if config.controller == "absa":
        return ABSA(
            batch,
            cap,
            decay_factor=config.decay_factor,
            growth_factor=config.growth_factor,
            patience=config.patience or None,
            adversarial_share=share,
            share_decay=config.share_decay,
        )
    if config.controller == "warmup":
        return Warmup(cap, batch, adversarial_share=share)
    if config.controller == "adabatch":
        return AdaBatch(batch, cap, growth_factor=config.growth_factor, adversarial_share=share)
    if config.controller == "grow-instead-of-decay":
        milestones = config.milestones or ()
        return GrowInsteadOfDecay(
            batch, cap, milestones=milestones, decay_factor=1 / config.lr_decay, adversarial_share=share
        )
    return FixedBatch(batch, adversarial_share=share)


def build_adversary(config: TrainConfig, parts: Parts) -> Adversary | None:
    """The attack by name, its size and bounds in the units of the normalised inputs."""
    if config.adversary == "none":
        return None
    eps = config.eps / torch.tensor(parts.spread).view(-1, 1, 1)
    attack = FGSM if config.adversary == "fgsm" else PGD
    return attack(eps, value_range=parts.train.value_range, seed=config.seed)


def build_probe(config: TrainConfig, parts: Parts) -> CurvatureProbe | None:
    """A probe on a fixed, un-augmented sample of the training set."""
    if config.curvature == "off":
        return None
    count = min(config.probe_examples, parts.train.num_examples)
    return CurvatureProbe(
        parts.model,
        nn.CrossEntropyLoss(),
        parts.train.sample(count, config.seed),
        tol=config.probe_tolerance,
        norm_mode=config.norm_mode,
        seed=config.seed,
    )


def load_config(run_dir: str | Path) -> TrainConfig:
    """The resolved settings of a run directory.

    Raises:
        HessianFlowError: no run there, or one that the command did not make.
    """
    folder = Path(run_dir)
    path = folder / CONFIG
    if not path.is_file():
        raise HessianFlowError(f"{folder} is not a run directory: it holds no {CONFIG}")
    settings = read_json(path).get("settings")
    if not isinstance(settings, dict):
        raise HessianFlowError(f"{path} holds no settings: a run made from Python is continued from Python")
    return from_dict({**settings, "run_dir": str(folder)}, str(path))


def find_checkpoint(path: str | Path) -> tuple[Path, Path]:
    """(run directory, checkpoint file) of a run directory or of a checkpoint inside one.

    Raises:
        HessianFlowError: neither.
    """
    given = Path(path)
    if given.is_dir():
        return given, given / checkpoint.FOLDER / checkpoint.LAST
    if given.is_file() and given.parent.name == checkpoint.FOLDER:
        return given.parent.parent, given
    raise HessianFlowError(f"{given} is neither a run directory nor a checkpoint inside one")


def load_parts(path: str | Path) -> tuple[TrainConfig, Parts, dict[str, Any]]:
    """Settings, model with trained weights, data, and checkpoint of a run directory or a checkpoint inside one."""
    run_dir, file = find_checkpoint(path)
    config = load_config(run_dir)
    parts = build_parts(config)
    state = checkpoint.load(file)
    checkpoint.load_model(parts.model, state["model"], str(file))
    return config, parts, state


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto": the first GPU, or the processor.

    Raises:
        HessianFlowError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise HessianFlowError(f"--device {name} cannot be used here: {reason}; use cpu or auto") from None
    return device


def _batches(images: ImageSet, batch_size: int, **options: Any) -> DeviceBatches:
    return DeviceBatches(images.images, images.targets, batch_size, num_classes=images.num_classes, **options)


def _given(value: T | None) -> T:
    assert value is not None, "only resolved configurations are built"
    return value
