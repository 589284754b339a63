"""The only place that joins the parts: from a resolved configuration to a trainer."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.adversarial import InputCurvature, RobustnessWatch
from hessianflow.batches import split
from hessianflow.choices import (
    build_adversary,
    build_controller,
    build_observers,
    build_optimizer,
    build_scheduler,
    build_stages,
    microbatch_default,
    scaled_eps,
    split_for_twins,
)
from hessianflow.config import RunConfig, TrainConfig, from_dict, option, to_dict
from hessianflow.control import Stage, stage_at
from hessianflow.curvature import CurvatureProbe, HessianOperator, top_eigenpairs
from hessianflow.curvature.probe import GRADIENTS_PER_PRODUCT, ProbeOperator
from hessianflow.data import (
    AdaptiveBatches,
    Augmentation,
    DeviceBatches,
    ImageFolder,
    ImageSet,
    load,
)
from hessianflow.distributed.curvature import sharded
from hessianflow.interfaces import (
    Batch,
    EpochMeasurement,
    HessianFlowError,
    LinearOperator,
    RecordSink,
    World,
)
from hessianflow.machine import computes_in_bf16, find_device
from hessianflow.memory import keep_freed_memory
from hessianflow.models import create
from hessianflow.models.catalogue import Variant
from hessianflow.models.dropout import with_head_dropout
from hessianflow.normalisation import is_split, merge_batch_norm
from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.presets import BUNDLED, FILE_SIDE
from hessianflow.resolve import resolve
from hessianflow.runs import TensorBoardSink, checkpoints
from hessianflow.runs.documents import read_config
from hessianflow.runs.names import CHECKPOINTS, CONFIG, LAST, TENSORBOARD
from hessianflow.runs.states import check_weights
from hessianflow.training import AdaptiveBatchTrainer, checkpoint
from hessianflow.training.accumulate import Precision
from hessianflow.training.progressive import ProgressiveResize, check_resolutions
from hessianflow.training.world import LocalWorld
from hessianflow.upgrade import upgrade

EVALUATION_BATCH = {"cpu": 128}
"""Test examples per forward pass by kind of device, else 1000: on a processor the caches hold no
more. Ours."""
FLOAT32_PER_16_BIT = 1.7
"""Cost of a gradient in float32, in gradients under 16-bit autocast; measured: ResNet-20, AMD EPYC
with bf16 units."""

FIRST_SHARE, FEWEST_PRODUCTS = 0.25, 5
"""Share of the cost of the whole training that the first reading may take, and the fewest products
that it is made with. Ours: it comes before there is a price, and a short run on few images would
spend most of its time on it."""
RECALIBRATION_EXAMPLES = 1024
"""Training examples that statistics of normalisation are measured on before an evaluation. Ours."""
WATCHED_EPS = 0.005
"""Size of the attacks that the overfitting alarm makes where the adversary has none: FGSM's
default."""
WATCHED_EXAMPLES, INPUT_CURVATURE_EXAMPLES, MOST_PRODUCTS = 256, 16, 60
"""Sizes of the measurements after an epoch, and the most products that one eigenvalue may take.
Ours."""


@dataclass(frozen=True)
class Parts:
    """A model and its data, before anything trains.

    Attributes:
        model: on its device.
        train: shuffled and augmented.
        test: plain, in the stored order.
        spread: standard deviation per channel that the pixels were divided by: an eps in pixel
            units is, too.
    """

    model: nn.Module
    train: DeviceBatches | AdaptiveBatches
    test: DeviceBatches | AdaptiveBatches
    spread: tuple[float, ...]


def build_trainer(
    config: RunConfig, sinks: Iterable[RecordSink] = (), world: World | None = None
) -> AdaptiveBatchTrainer:
    """Return a trainer for a run; `world`: the ranks it trains with, None for one process.

    Raises:
        HessianFlowError: data that is missing or damaged, a name that is unknown, sizes that do not
            fit.
    """
    world = LocalWorld() if world is None else world
    parts = build_parts(config)
    optimizer = build_optimizer(config, parts.model)
    controller = build_controller(config)
    observers = build_observers(controller, optimizer)
    examples = parts.train.num_examples
    scheduler, unit = build_scheduler(config, optimizer, examples)
    stages = build_stages(config)
    transform = build_transform(parts, stages)
    model = torch.compile(parts.model, dynamic=True) if config.compile else parts.model
    assert isinstance(model, nn.Module)
    return AdaptiveBatchTrainer(
        model,
        parts.train,
        parts.test,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        controller=controller,
        adversary=build_adversary(config, parts.train, parts.spread),
        epochs=config.epochs,
        scheduler=scheduler,
        schedule_unit=unit,
        probe=build_probe(config, parts, transform, sharded(world)),
        transform=transform,
        before_evaluation=None if transform is None else build_recalibration(config, parts),
        measurements=build_measurements(config, parts),
        curvature="needed" if config.curvature == "needed" else "epoch",
        reference_batch_size=config.batch_size,
        microbatch_size=(
            microbatch_default(config, observers)
            if config.microbatch_size is None
            else config.microbatch_size
        ),
        norm_batch_size=0 if config.norm_batch_size == "ranks" else config.norm_batch_size,
        norm_statistics=config.norm_statistics,
        observers=observers,
        precision=resolved_precision(config),
        run_dir=config.run_dir,
        config={"settings": to_dict(config), **resolution_record(stages)},
        sinks=[*sinks, *tensorboard_sinks(config)],
        checkpoint_examples=config.checkpoint_examples,
        checkpoint_minutes=config.checkpoint_minutes,
        keep_checkpoints=config.keep_checkpoints,
        on_divergence=config.on_divergence,
        max_rollbacks=config.max_rollbacks,
        world=world,
    )


def prepare(config: TrainConfig) -> RunConfig:
    """Return the settings resolved for this machine, and set what is kept for the whole process.

    Device and precision are those of this machine.
    """
    return on_this_machine(resolve(config))


def on_this_machine(config: RunConfig) -> RunConfig:
    """Return the settings of a run with device and precision of this machine, and set what is kept
    for the whole process: threads, allocator, determinism."""
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
    train, test = _read(config, "train"), _read(config, "test")
    batch = config.batch_size
    for name in ("batch_size", "max_batch_size", "probe_examples"):
        size = getattr(config, name)
        if size is not None and size > len(train):
            raise HessianFlowError(
                f"{option(name)} {size} is larger than the {len(train)} training examples of"
                f" {config.data}"
            )
    # the stream of initialisation; all others have generators of their own
    torch.manual_seed(config.seed)
    channels, side, _ = train.input_shape
    variant: Variant = "imagenet" if side > 64 else "cifar"
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
    layout = bool(config.channels_last)
    if layout:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shared: dict[str, Any] = {
        "device": device,
        "channels_last": layout,
        "num_workers": config.loader_workers,
    }
    return Parts(
        model,
        train.batches(batch, train=True, seed=config.seed, **shared),
        test.batches(EVALUATION_BATCH.get(device.type, 1000), train=False, **shared),
        train.std,
    )


def resolution_record(stages: tuple[Stage, ...]) -> dict[str, Any]:
    """Return the stages for config.json; nothing where the resolution never changes."""
    return {"resolution_stages": [asdict(stage) for stage in stages]} if stages else {}


def build_transform(parts: Parts, stages: tuple[Stage, ...]) -> ProgressiveResize | None:
    """Return what resizes the batches; None where the resolution never changes.

    Raises:
        HessianFlowError: the model takes images of one size only.
    """
    if not stages:
        return None
    image, _ = parts.train.sample(1)
    check_resolutions(parts.model, image, sorted({stage.level.resolution for stage in stages}))
    return ProgressiveResize(parts.model, lambda epoch: stage_at(stages, epoch).level)


def build_recalibration(config: RunConfig, parts: Parts) -> Callable[[], None]:
    """Measures the statistics of normalisation at full resolution, on batches of the first size."""
    count = min(RECALIBRATION_EXAMPLES, parts.train.num_examples)
    sample = list(split(parts.train.sample(count, config.seed), config.batch_size))
    return partial(recalibrate, parts.model, sample)


def build_probe(
    config: RunConfig,
    parts: Parts,
    transform: ProgressiveResize | None = None,
    operator: Callable[..., ProbeOperator] = HessianOperator,
) -> CurvatureProbe | None:
    """Return a probe on a fixed, un-augmented sample of the training set, at the resolution that
    training is at."""
    if config.curvature == "off":
        return None
    count = min(config.probe_examples, parts.train.num_examples)
    sample: Batch = parts.train.sample(count, config.seed)
    return CurvatureProbe(
        parts.model,
        nn.CrossEntropyLoss(),
        sample if transform is None else partial(transform.at_hand, sample),
        tol=config.probe_tolerance,
        budget=_budget(config),
        first_matvecs=first_products(config, count, parts.train.num_examples),
        norm_mode=config.norm_mode,
        check_statistics=config.norm_statistics == "settled",
        seed=config.seed,
        operator=operator,
    )


def first_products(config: RunConfig, probe_examples: int, train_examples: int) -> int | None:
    """Return the most products of the first reading, whose price is not known: it may take
    FIRST_SHARE of the whole training.

    Returns:
        0 where that leaves too few for a reading; None where no budget was wanted.
    """
    budget = _budget(config)
    if budget is None:
        return None
    examples = config.epochs * train_examples * max(budget, FIRST_SHARE)
    products = int((examples / probe_examples - 1) / GRADIENTS_PER_PRODUCT)
    return products if products >= FEWEST_PRODUCTS else 0


def _budget(config: RunConfig) -> float | None:
    """Return the share in the probe's units: it counts gradients of the precision that products are
    computed in."""
    if config.curvature_budget is None or resolved_precision(config) == "float32":
        return config.curvature_budget
    return config.curvature_budget / FLOAT32_PER_16_BIT


def build_measurements(config: RunConfig, parts: Parts) -> list[EpochMeasurement]:
    """Return what is measured after every epoch, on the first test examples."""
    found: list[EpochMeasurement] = []
    if config.overfitting_alarm:
        eps = scaled_eps(
            config.adversary.options.get("eps", WATCHED_EPS), torch.tensor(parts.spread)
        )
        batch = parts.test.examples(torch.arange(min(WATCHED_EXAMPLES, parts.test.num_examples)))
        found.append(
            RobustnessWatch(
                parts.model, batch, eps, value_range=parts.train.value_range, seed=config.seed
            )
        )
    if config.input_curvature:
        batch = parts.test.examples(
            torch.arange(min(INPUT_CURVATURE_EXAMPLES, parts.test.num_examples))
        )

        def solve(operator: LinearOperator) -> dict[str, float]:
            result = top_eigenpairs(
                operator, tol=config.probe_tolerance, max_matvecs=MOST_PRODUCTS, seed=config.seed
            )
            value, residual = float(result.values[0]), float(result.residuals[0])
            return {"eigenvalue": value, "residual": residual, "matvecs": result.matvecs}

        found.append(InputCurvature(parts.model, batch, solve))
    return found


def load_config(run_dir: str | Path) -> RunConfig:
    """Return the resolved settings of a run directory.

    Raises:
        HessianFlowError: no run there, or one that the command did not make.
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
    """Return (run directory, checkpoint file) of a run directory or of a checkpoint inside one.

    Raises:
        HessianFlowError: neither.
    """
    given_path = Path(path)
    if given_path.is_dir():
        return given_path, given_path / CHECKPOINTS / LAST
    if given_path.is_file() and given_path.parent.name == CHECKPOINTS:
        return given_path.parent.parent, given_path
    raise HessianFlowError(f"{given_path} is neither a run directory nor a checkpoint inside one")


def load_parts(path: str | Path) -> tuple[RunConfig, Parts]:
    """Return settings, data, and the model with its trained weights, of a run directory or a
    checkpoint inside one.

    Of a model with split batch normalisation, the main set.
    """
    run_dir, file = find_checkpoint(path)
    config = on_this_machine(load_config(run_dir))
    state = checkpoints.load_checked(file, check_weights)
    parts = build_parts(config)
    checkpoint.load_model(parts.model, state["model"], str(file))
    return config, (
        replace(parts, model=merge_batch_norm(parts.model)) if is_split(parts.model) else parts
    )


def tensorboard_sinks(config: RunConfig) -> list[RecordSink]:
    """Return the TensorBoard files of a run, if it is to have them."""
    if not config.tensorboard:
        return []
    if config.run_dir is None:
        raise HessianFlowError("--tensorboard needs --run-dir: the folder its files go to")
    return [TensorBoardSink(Path(config.run_dir) / TENSORBOARD)]


def resolved_precision(config: RunConfig) -> Precision:
    """Return the precision asked for; auto: bf16 where the device computes in it."""
    if config.precision is None or config.precision == "auto":
        return "bf16" if computes_in_bf16(find_device(config.device)) else "float32"
    return config.precision


def _read(config: RunConfig, part: Any) -> ImageSet | ImageFolder:
    if config.data_dir is None and config.data not in BUNDLED:
        raise HessianFlowError(
            f"--data {config.data} needs --data-dir, the folder of its official files "
            f"(`hessianflow data fetch {config.data} --data-dir DIR` gets them)"
        )
    images = load(config.data, config.data_dir, part, image_size=config.image_size or FILE_SIDE)
    if not config.augment:
        plain: dict[str, Any] = {
            "augment": Augmentation() if isinstance(images, ImageSet) else False
        }
        images = replace(images, **plain)
    count = config.train_examples if part == "train" else config.test_examples
    if count is None:
        return images
    if count > len(images):
        raise HessianFlowError(
            f"--{part}-examples {count} is more than the {len(images)} that the {part} set of"
            f" {config.data} has"
        )
    return images.take(count)
