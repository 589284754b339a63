"""What the names in a configuration stand for: optimizer, schedule, controller, attack,
observers."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.adversarial import (
    FGSM,
    PGD,
    AttackRunner,
    ConcurrentAdversary,
    GradientReuse,
    Interleaved,
    SecondStream,
    WorkerProcess,
)
from hessianflow.config import TrainConfig
from hessianflow.control import (
    ABS,
    ABSA,
    CABS,
    AdaBatch,
    CriticalBatch,
    DiveBatch,
    FixedBatch,
    GrowInsteadOfDecay,
    Level,
    NoiseScale,
    ProgressiveResolution,
    Stage,
    TimedSchedule,
    Warmup,
    resolution_stages,
)
from hessianflow.control.rate_rule import RateRule
from hessianflow.data import AdaptiveBatches, DeviceBatches
from hessianflow.interfaces import Adversary, BatchController, GradientObserver, HessianFlowError
from hessianflow.normalisation import split_batch_norm
from hessianflow.optim import (
    CLARS,
    LAMB,
    LARS,
    SAM,
    GradientMoments,
    MicrobatchNorms,
    cooldown,
    polynomial_decay,
)
from hessianflow.optim.lars import Form

T = TypeVar("T")
WARMUP_EPOCHS = 5
"""Length of the warm-up controller's ramp where none is given: that of Goyal et al.,
arXiv:1706.02677."""


def given(value: T | None) -> T:
    """Return a field that resolving has filled."""
    assert value is not None, "only resolved configurations are built"
    return value


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer by name, over all trainable parameters; within sharpness-aware
    minimisation if wanted."""
    base = _base_optimizer(config, model)
    return SAM(base, rho=config.sam_rho, model=model) if config.sam_rho > 0 else base


def _base_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, momentum, decay = given(config.lr), config.momentum, config.weight_decay
    form: Form = "outside" if config.momentum_correction else "paper"
    trust: dict[str, Any] = (
        {} if config.trust_coefficient is None else {"trust_coefficient": config.trust_coefficient}
    )
    makers: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay),
        "adam": lambda: Adam(parameters, lr=rate, weight_decay=decay),
        "adamw": lambda: AdamW(parameters, lr=rate, weight_decay=decay),
        "lars": lambda: LARS(
            parameters, rate, momentum=momentum, weight_decay=decay, form=form, **trust
        ),
        "clars": lambda: CLARS(parameters, rate, momentum=momentum, weight_decay=decay, **trust),
        "lamb": lambda: LAMB(parameters, rate, weight_decay=decay),
    }
    return makers[config.optimizer]()


def build_scheduler(
    config: TrainConfig, optimizer: Optimizer, examples: int
) -> tuple[LRScheduler | None, Literal["epoch", "reference_batch"]]:
    """Return the schedule below the controller's factor, and what it counts.

    Without warm-up it takes one step an epoch. With warm-up it takes one a reference batch of
    examples, so that the rate rises smoothly.
    """
    epochs, milestones = given(config.epochs), list(config.milestones or ())
    if config.warmup_epochs > 0 and config.controller != "warmup":  # which has a ramp of its own
        steps_per_epoch = examples / given(config.batch_size)
        shape = schedule_shape(config)
        warmup = config.warmup_epochs

        def factor(step: int) -> float:
            epoch = step / steps_per_epoch
            return min((step + 1) / (steps_per_epoch * warmup), 1.0) * shape(epoch)

        return lr_scheduler.LambdaLR(optimizer, factor), "reference_batch"
    if config.schedule == "multistep":
        return lr_scheduler.MultiStepLR(optimizer, milestones, gamma=config.lr_decay), "epoch"
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs), "epoch"
    if config.schedule == "polynomial":
        return lr_scheduler.LambdaLR(optimizer, polynomial_decay(epochs)), "epoch"
    if config.schedule == "cooldown":
        return lr_scheduler.LambdaLR(optimizer, cooldown(epochs, given(config.decay_from))), "epoch"
    return None, "epoch"


def schedule_shape(config: TrainConfig) -> Callable[[float], float]:
    """Return the schedule's factor after a fractional number of epochs, warm-up apart."""
    epochs, milestones = given(config.epochs), list(config.milestones or ())
    shapes: dict[str | None, Callable[[float], float]] = {
        "constant": lambda _epoch: 1.0,
        "multistep": lambda epoch: float(config.lr_decay ** sum(epoch >= m for m in milestones)),
        "cosine": lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1))),
        "polynomial": lambda epoch: max(1 - epoch / epochs, 0.0) ** 2,
        "cooldown": lambda epoch: cooldown(epochs, given(config.decay_from))(epoch),
    }
    return shapes[config.schedule]


def build_stages(config: TrainConfig) -> tuple[Stage, ...]:
    """Return the resolutions over a run; none where it keeps the full one.

    Raises:
        HessianFlowError: a stretch of constant rate has fewer epochs than there are resolutions.
    """
    if config.resolution is None:
        return ()
    epochs, resolutions = given(config.epochs), given(config.resolutions)
    milestones = (config.milestones or ()) if config.schedule == "multistep" else ()
    ends = [*(milestone for milestone in milestones if milestone < epochs), epochs]
    sizes = config.resolution_batch_sizes or (given(config.batch_size),) * len(resolutions)
    dropouts = config.dropouts or (0.0,) * len(resolutions)
    levels = [Level(*level) for level in zip(resolutions, sizes, dropouts, strict=True)]
    try:
        return resolution_stages(ends, levels, config.resolution)
    except HessianFlowError as error:
        raise HessianFlowError(
            f"--resolution {config.resolution}: {error}; see --milestones and --epochs"
        ) from None


_OWN_RULE = ("warmup", "timed")
"""Controllers that apply the rule themselves, within a ramp or a decay."""


def build_controller(config: TrainConfig) -> BatchController:
    """Return the controller by name, under the learning-rate rule and with the resolutions that
    were asked for.

    Raises:
        HessianFlowError: dual-batch, which plans its batches beforehand.
    """
    if config.controller == "dual-batch":
        raise HessianFlowError(
            "--controller dual-batch plans its batches before a run: it decides nothing during one"
        )
    controller, stages = _named_controller(config), build_stages(config)
    if config.lr_rule is not None and config.controller not in _OWN_RULE:
        controller = RateRule(controller, config.lr_rule, max_factor=config.max_lr_factor)
    return ProgressiveResolution(controller, stages) if stages else controller


def _named_controller(config: TrainConfig) -> BatchController:
    batch, cap = given(config.batch_size), given(config.max_batch_size)

    def adabatch() -> BatchController:
        every, factor = config.every_epochs, config.growth_factor
        return AdaBatch(batch, cap, every_epochs=every, growth_factor=factor)

    def grow_instead() -> BatchController:
        factor = 1 / config.lr_decay
        milestones = config.milestones or ()
        return GrowInsteadOfDecay(batch, cap, milestones=milestones, decay_factor=factor)

    makers: dict[str, Callable[[], BatchController]] = {
        "absa": lambda: _absa(config),
        "abs": lambda: _absa(config),
        "fixed": lambda: FixedBatch(batch),
        "warmup": lambda: _warmup(config),
        "adabatch": adabatch,
        "grow-instead-of-decay": grow_instead,
        "noise-scale": lambda: NoiseScale(batch, cap),
        "cabs": lambda: CABS(batch, cap, min_batch_size=min(16, batch)),
        "critical": lambda: _critical(config),
        "divebatch": lambda: DiveBatch(batch, cap),
        "timed": lambda: _timed(config),
    }
    return makers[config.controller]()


def attacked_share(config: TrainConfig) -> float:
    """Return the share of each batch that the adversary of a run attacks; 0 without one."""
    if config.adversary == "none" or config.controller == "abs":
        return 0.0
    return given(config.adversarial_share)


def _absa(config: TrainConfig) -> ABSA:
    batch, cap = given(config.batch_size), given(config.max_batch_size)
    shared: dict[str, Any] = {
        "decay_factor": config.decay_factor,
        "growth_factor": config.growth_factor,
        "patience": config.patience or None,
    }
    if attacked_share(config) == 0:
        return ABS(batch, cap, **shared)
    return ABSA(batch, cap, share_decay=config.share_decay, **shared)


def _warmup(config: TrainConfig) -> Warmup:
    return Warmup(
        given(config.max_batch_size),
        given(config.batch_size),
        warmup_epochs=config.warmup_epochs or WARMUP_EPOCHS,
        lr_rule=config.lr_rule or "linear",
        max_lr_factor=config.max_lr_factor,
    )


def _timed(config: TrainConfig) -> TimedSchedule:
    return TimedSchedule(
        given(config.batch_size),
        given(config.stages),
        decay_from=config.decay_from,
        lr_rule=config.lr_rule or "linear",
        max_lr_factor=config.max_lr_factor,
    )


def _critical(config: TrainConfig) -> CriticalBatch:
    return CriticalBatch(
        given(config.batch_size),
        given(config.max_batch_size),
        momentum=config.momentum,
        loss_power=config.loss_power or None,
        edge_share=config.edge_share or None,
        excess_power=config.excess_power,
    )


def build_adversary(
    config: TrainConfig, batches: DeviceBatches | AdaptiveBatches, spread: tuple[float, ...]
) -> Adversary | None:
    """Return the adversary by name, its size and bounds in the units of the normalised inputs.

    Args:
        batches: the training data, which know their valid range.
        spread: standard deviation per channel that the pixels were divided by.
    """
    if config.adversary == "none" or config.controller == "abs":
        return None
    share = given(config.adversarial_share)
    eps, limits = config.eps / torch.tensor(spread).view(-1, 1, 1), batches.value_range
    assert limits is not None, "image sets know their valid range"
    makers: dict[str, Callable[[], FGSM | PGD]] = {
        "fgsm": lambda: FGSM(eps, share=share, value_range=limits, seed=config.seed),
        "pgd": lambda: PGD(eps, share=share, value_range=limits, seed=config.seed),
    }
    if config.adversary == "reuse":
        return GradientReuse(batches, eps, share=share, value_range=limits)  # type: ignore[arg-type]
    if config.adversary == "conadv":
        attack, runner = (
            makers[config.conadv_attack or "fgsm"](),
            build_runner(config, batches.device),
        )
        staleness = 1 if config.staleness is None else config.staleness
        return ConcurrentAdversary(
            attack,
            share=share,
            staleness=staleness,
            combine=config.combine or "sum",
            runner=runner,
        )
    return makers[config.adversary]()


def build_runner(config: TrainConfig, device: torch.device) -> AttackRunner:
    """Return where the attacks of conadv run.

    Raises:
        HessianFlowError: a second stream without a GPU, or a second process with one.
    """
    on_gpu = device.type == "cuda"
    if config.attack_runner == ("process" if on_gpu else "stream"):
        other = "stream" if on_gpu else "process"
        raise HessianFlowError(
            f"--attack-runner {config.attack_runner} cannot attack on {device}: use {other}"
        )
    makers: dict[str, Callable[[], AttackRunner]] = {
        "interleaved": Interleaved,
        "process": WorkerProcess,
        "stream": SecondStream,
    }
    return makers[config.attack_runner or ("stream" if on_gpu else "interleaved")]()


def split_for_twins(config: TrainConfig, model: nn.Module) -> nn.Module:
    """Return the model, with batch-normalisation statistics of their own for the twins of conadv if
    it is to have them."""
    normalises = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    )
    wanted = normalises if config.split_norm is None else config.split_norm
    return split_batch_norm(model) if config.adversary == "conadv" and wanted else model


def build_observers(config: TrainConfig, optimizer: Optimizer) -> list[GradientObserver]:
    """Return what the controller and the optimizer want to know of the microbatch gradients."""
    observers: list[GradientObserver] = []
    optimizer = optimizer.base if isinstance(optimizer, SAM) else optimizer
    if isinstance(optimizer, CLARS) and isinstance(optimizer.norms, MicrobatchNorms):
        observers.append(optimizer.norms)
    if config.controller in ("noise-scale", "cabs", "divebatch"):
        observers.append(GradientMoments(accumulate=config.controller == "divebatch"))
    return observers


def microbatch_default(config: TrainConfig) -> int | None:
    """Methods that compare microbatch gradients need several a step: a quarter of the batch.
    Others: None."""
    compares = config.optimizer == "clars" or config.controller in (
        "noise-scale",
        "cabs",
        "divebatch",
    )
    return max(1, given(config.batch_size) // 4) if compares else None
