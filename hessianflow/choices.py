"""Builders of the objects that a trainer is made of, by the names in a resolved configuration."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.config import RunConfig
from hessianflow.control import Level, ProgressiveResolution, Stage, resolution_stages
from hessianflow.control.noise_scale import MOMENT_SIGNALS
from hessianflow.control.rate_rule import RateRule
from hessianflow.data import AdaptiveBatches, DeviceBatches, TextBatches
from hessianflow.interfaces import Adversary, BatchController, GradientObserver, HessianFlowError
from hessianflow.methods import KINDS, Choice, find, make
from hessianflow.normalisation import split_batch_norm
from hessianflow.optim import CLARS, SAM, Extrapolation, GradientMoments, MicrobatchNorms
from hessianflow.options import parameters_of
from hessianflow.resolve import innermost, schedule_of

MICROBATCHES = 4
"""Microbatches of the first batch if a method compares their gradients. This default is our
choice."""


def build_optimizer(config: RunConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer by name, over all trainable parameters, in the groups that it wants.

    Raises:
        HessianFlowError: The optimizer refuses an option or the model, or is none of torch's.
    """
    parameters = parameters_for(config.optimizer, model)
    optimizer = make(
        KINDS["optimizer"], config.optimizer, params=parameters, lr=config.lr, model=model
    )
    if not isinstance(optimizer, Optimizer):
        raise HessianFlowError(
            f"--optimizer {config.optimizer.name} must make a torch.optim.Optimizer, got a"
            f" {type(optimizer).__name__}"
        )
    _check_capturable(config, model)
    return optimizer


def _check_capturable(config: RunConfig, model: nn.Module) -> None:
    """Refuse what torch's own optimizers would fail at in their first step."""
    choice = innermost(config.optimizer)
    is_of_torch = find(KINDS["optimizer"], choice.name, "optimizer").__module__.startswith("torch.")
    device = next(model.parameters()).device.type
    if is_of_torch and device == "cpu" and choice.options.get("capturable") is True:
        raise HessianFlowError(
            f"--optimizer.capturable true of {choice.name} needs a GPU, and the run is on cpu:"
            " leave it out"
        )


def parameters_for(optimizer: Choice, model: nn.Module) -> list[Any]:
    """Return the trainable parameters of a model, in the groups that an optimizer asks for.

    An optimizer that wraps another (SAM) gets those of the other.
    """
    kind = KINDS["optimizer"]
    groups_of = getattr(find(kind, innermost(optimizer).name, kind.name), "groups_of", None)
    if groups_of is None:
        return [p for p in model.parameters() if p.requires_grad]
    groups: list[Any] = groups_of(model)
    return groups


def build_scheduler(
    config: RunConfig, optimizer: Optimizer, examples: int
) -> tuple[LRScheduler | None, Literal["epoch", "reference_batch"]]:
    """Return the schedule below the controller's factor, and the unit of its steps.

    It takes one step per epoch. With warm-up, or if a pass over the data is divided into parts, it
    takes one step per reference batch of examples, so that the rate changes smoothly. A scheduler
    class of torch has no warm-up, and takes one step per part.
    """
    kind = KINDS["schedule"]
    if "optimizer" in parameters_of(find(kind, config.schedule.name, "schedule")):
        epochs = config.counted_epochs
        scheduler = make(kind, config.schedule, epochs=epochs, optimizer=optimizer)
        return scheduler, "epoch"
    shape = schedule_of(config)
    if config.warmup_epochs == 0 and config.schedule.name == "constant":
        return None, "epoch"

    # The state of a scheduler would hold the attributes of an object, so it is given a function.
    def of_epoch(epoch: int) -> float:
        return float(shape(epoch))

    if config.warmup_epochs == 0 and config.counted_epochs == config.epochs:
        return lr_scheduler.LambdaLR(optimizer, of_epoch), "epoch"
    steps_per_epoch = examples / config.batch_size
    warmup_steps = steps_per_epoch * config.warmup_epochs

    def of_step(step: int) -> float:
        ramp = min((step + 1) / (warmup_steps or 1.0), 1.0)
        return ramp * float(shape(step / steps_per_epoch))

    return lr_scheduler.LambdaLR(optimizer, of_step), "reference_batch"


def build_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of resolution in a run; () if the resolution never changes."""
    resolutions = config.resolutions
    if config.resolution is None or resolutions is None:
        return ()
    milestones = config.schedule.options.get("milestones", ())
    ends = [*(milestone for milestone in milestones if milestone < config.epochs), config.epochs]
    sizes = config.resolution_batch_sizes or (config.batch_size,) * len(resolutions)
    dropouts = config.dropouts or (0.0,) * len(resolutions)
    levels = [Level(*level) for level in zip(resolutions, sizes, dropouts, strict=True)]
    try:
        return resolution_stages(ends, levels, config.resolution)
    except HessianFlowError as error:
        raise HessianFlowError(
            f"--resolution {config.resolution}: {error}; see --schedule.milestones and --epochs"
        ) from None


def build_controller(config: RunConfig) -> BatchController:
    """Return the controller, with the rate rule and the resolutions that the run asks for."""
    if config.is_dual_batch:
        raise HessianFlowError(
            "--controller dual-batch plans its batches before a run: it decides nothing during one"
        )
    kind = KINDS["controller"]
    names = ["batch_size", "max_batch_size"]
    if config.lr_rule is not None:
        names += ["lr_rule", "max_lr_factor"]
    supplied = {name: getattr(config, name) for name in names}
    controller: BatchController = make(kind, config.controller, **supplied)
    applies_rule = "lr_rule" in parameters_of(find(kind, config.controller.name, "controller"))
    if config.lr_rule is not None and not applies_rule:
        controller = RateRule(controller, config.lr_rule, max_factor=config.max_lr_factor)
    stages = build_stages(config)
    if stages:
        controller = ProgressiveResolution(controller, stages)
    return controller


def build_adversary(
    config: RunConfig,
    batches: DeviceBatches | AdaptiveBatches | TextBatches,
    spread: tuple[float, ...],
) -> Adversary | None:
    """Return the adversary, with its size and bounds in the units of the normalised inputs.

    The data give the valid range; `spread` is the standard deviation per channel by which the
    pixels were divided.
    """
    if config.adversary.name == "none":
        return None
    chosen = _scaled(config.adversary, torch.tensor(spread).view(-1, 1, 1))
    if chosen.name == "conadv":
        chosen = chosen.with_options(runner=_runner(chosen.options["runner"], batches.device))
    limits = batches.value_range
    kind = KINDS["adversary"]
    made: Adversary = make(kind, chosen, value_range=limits, seed=config.seed, batches=batches)
    return made


def _scaled(chosen: Choice, spread: torch.Tensor) -> Choice:
    """Return an attack whose size is in the units of inputs that were divided by `spread`."""
    options = dict(chosen.options)
    for name, value in options.items():
        if isinstance(value, Choice):
            options[name] = _scaled(value, spread)
    if "eps" in options:
        options["eps"] = scaled_eps(options["eps"], spread)
    return Choice(chosen.name, options)


def scaled_eps(eps: float | Sequence[float], spread: torch.Tensor) -> torch.Tensor:
    """Return the size of an attack, one number or one per channel, in the units of inputs that were
    divided by `spread` (one per channel).
    """
    if not isinstance(eps, Sequence):
        return eps / spread
    sizes = torch.tensor(eps, dtype=spread.dtype)
    if len(sizes) not in (1, len(spread)):
        raise HessianFlowError(
            f"--adversary.eps must be one number or one per channel, {len(spread)}, got {eps}"
        )
    return sizes.view(-1, *(1,) * (spread.ndim - 1)) / spread


def _runner(chosen: Choice | None, device: torch.device) -> Choice:
    """Return the runner of the attacks of conadv: the one chosen, or the default of the device."""
    usual = "interleaved"
    alternatives = {"stream": "process"}
    if device.type == "cuda":
        usual = "stream"
        alternatives = {"process": "stream"}
    if chosen is None:
        return Choice(usual)
    if chosen.name in alternatives:
        raise HessianFlowError(
            f"--adversary.runner {chosen.name} cannot attack on {device}: use"
            f" {alternatives[chosen.name]}"
        )
    return chosen


def split_for_twins(config: RunConfig, model: nn.Module) -> nn.Module:
    """Return the model, with a second set of batch normalisation for twins if the run asks for it.

    Without `split_norm`, conadv has the second set if the model has batch normalisation.
    """
    if config.adversary.name != "conadv":
        return model
    wanted = config.split_norm
    if wanted is None:
        batch_norm = nn.modules.batchnorm._BatchNorm
        wanted = any(isinstance(module, batch_norm) for module in model.modules())
    if wanted:
        return split_batch_norm(model)
    return model


def build_observers(controller: BatchController, optimizer: Optimizer) -> list[GradientObserver]:
    """Return the observers of microbatch gradients that controller and optimizer need."""
    observers: list[GradientObserver] = []
    while isinstance(optimizer, SAM | Extrapolation):
        optimizer = optimizer.base
    if isinstance(optimizer, CLARS) and isinstance(optimizer.norms, MicrobatchNorms):
        observers.append(optimizer.norms)
    if MOMENT_SIGNALS & controller.needs:
        observers.append(GradientMoments(accumulate="gradient_sum_sq" in controller.needs))
    return observers


def microbatch_default(config: RunConfig, observers: list[GradientObserver]) -> int | None:
    """Return a quarter of the batch if gradients of microbatches are compared, else None."""
    if not observers:
        return None
    return max(1, config.batch_size // MICROBATCHES)
