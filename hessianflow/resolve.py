"""The step from the settings as given to those of a run, which fills every open one, once."""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from hessianflow.bounds import user_path
from hessianflow.config import CHOSEN, RunConfig, TrainConfig, chosen
from hessianflow.data.datasets import FILE_SIDE, data_set
from hessianflow.data.image_files import training_images, usual_side
from hessianflow.data.presets import Preset
from hessianflow.effects import check_resolved
from hessianflow.facts import RunFacts
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import KINDS, Choice, complete, find, make, prefers
from hessianflow.options import parameters_of
from hessianflow.rates import ADAPTIVE, RATES

_CONTROLLER = ("decision", "is_due", "needs", "update")
NOT_ON_A_SERVER = ("lr_rule", "curvature_budget")
"""Settings with presets that do not apply to a run with a parameter server."""


def resolve(config: TrainConfig) -> RunConfig:
    """Fill every setting that was left open.

    An open cap is at least the batch size and, above it, at most `train_examples`; open probe
    examples are at most `train_examples`; open milestones keep their relative places in the run. An
    open schedule, adversary or `norm_mode` is the one that the controller prefers. Open settings
    are fitted to the user's own image files. A `~` at the beginning of a path is the home folder.

    Raises:
        HessianFlowError: Settings contradict each other, or a method refuses an option.
    """
    if isinstance(config, RunConfig):
        return config
    preset = data_set(config.data, "--data: ").preset
    data_dir = user_path(config.data_dir, "--data-dir")
    run_dir = user_path(config.run_dir, "--run-dir")
    config = fitted(replace(config, data_dir=data_dir, run_dir=run_dir))
    values = {setting.name: getattr(config, setting.name) for setting in fields(TrainConfig)}
    values |= _sizes(config, preset.settings)
    values |= _preferred(config, preset)
    run = _facts(values, values["optimizer"])
    values["optimizer"] = complete(
        KINDS["optimizer"], values["optimizer"], run, preset.methods, "optimizer"
    )
    inner = innermost(values["optimizer"])
    milestones = _milestones(preset.milestones, preset.settings["epochs"], values["epochs"])
    run = _facts(values, inner, milestones)
    for name in ("schedule", "adversary"):
        if values[name].name != "none":
            values[name] = complete(KINDS[name], values[name], run, preset.methods, name)
    counted = _counted(run, config.epoch_parts or 1)
    values["controller"] = complete(
        KINDS["controller"], values["controller"], counted, preset.methods, "controller"
    )
    values["lr"] = _rate(config, inner.name, preset.settings["lr"])
    values["lr_rule"] = config.lr_rule or _rule(values, inner.name)
    values |= _images(config)
    open_ones = [name for name, value in values.items() if value is None]
    if values["controller"].name == "dual-batch":
        open_ones = [name for name in open_ones if name not in NOT_ON_A_SERVER]
    values |= {name: preset.settings.get(name) for name in open_ones}
    resolved = RunConfig(**values)
    check_resolved(resolved)
    _try(resolved)
    return resolved


def fitted(config: TrainConfig) -> TrainConfig:
    """Return the settings with the open ones fitted to the image files below `data_dir`.

    Neither the cap on the batch size nor the probe exceeds the training set. Images of the data set
    "folder" are cut to the size that they have, but to 224 pixels at most. Settings of data sets
    that are not trees of files, or without a folder, stay as they are.
    """
    if data_set(config.data).read is not None:
        return config
    preset = data_set(config.data).preset.settings
    sized = ("max_batch_size", "probe_examples")
    changes: dict[str, Any] = {}
    open_ones = [name for name in (*sized, "image_size") if getattr(config, name) is None]
    files = []
    if open_ones and config.data_dir:
        files = training_images(config.data_dir, preset["max_batch_size"])
    for name in sized:
        if name in open_ones and 0 < len(files) < preset[name]:
            changes[name] = min(len(files), config.train_examples or len(files))
    if "max_batch_size" in changes:
        least = config.batch_size or preset["batch_size"]
        changes["max_batch_size"] = max(changes["max_batch_size"], least)
    if "image_size" in open_ones:
        changes["image_size"] = FILE_SIDE
        if config.resolutions:
            changes["image_size"] = config.resolutions[-1]
        elif config.data == "folder" and config.resolutions is None and files:
            changes["image_size"] = usual_side(files, FILE_SIDE)
    return replace(config, **changes)


def innermost(optimizer: Choice) -> Choice:
    """Return the optimizer that takes the step, inside any that wrap it."""
    while isinstance(optimizer.options.get("base"), Choice):
        optimizer = optimizer.options["base"]
    return optimizer


def _sizes(config: TrainConfig, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a run, which bound each other."""
    examples = config.train_examples or sys.maxsize
    part = -(-examples // (config.epoch_parts or 1))
    batch = config.batch_size or preset["batch_size"]
    cap = config.max_batch_size
    if config.controller.name == "dual-batch":
        cap = max(batch, cap or 1)  # no batch grows, so that any cap holds
    if cap is None:
        cap = max(min(preset["max_batch_size"], part), batch)
    elif cap < batch:
        raise HessianFlowError(
            f"--max-batch-size {cap} is below the batch size {batch} that {config.data} runs start"
            " with: raise the cap or set --batch-size"
        )
    return {
        "batch_size": batch,
        "max_batch_size": cap,
        "epochs": config.epochs or preset["epochs"],
        "probe_examples": config.probe_examples or min(preset["probe_examples"], examples),
    }


def _preferred(config: TrainConfig, preset: Preset) -> dict[str, Any]:
    """Return methods as given, or as the controller prefers, or as is usual for the data set."""
    values: dict[str, Any] = {**preset.usual_methods, "norm_mode": "eval"}
    values |= prefers(KINDS["controller"], config.controller)
    for name, preferred in values.items():
        values[name] = getattr(config, name) or preferred
        if name in CHOSEN:
            values[name] = chosen(name, values[name])
    return values


def _facts(
    values: Mapping[str, Any], optimizer: Choice, milestones: tuple[int, ...] = ()
) -> RunFacts:
    return RunFacts(
        epochs=values["epochs"],
        batch_size=values["batch_size"],
        max_batch_size=values["max_batch_size"],
        optimizer=optimizer.name,
        momentum=optimizer.options.get("momentum"),
        milestones=milestones,
        schedule=values["schedule"].name,
        warmup_epochs=values["warmup_epochs"],
        norm_mode=values["norm_mode"],
        lr_rule=values["lr_rule"],
        adversary=values["adversary"].name,
    )


def _counted(run: RunFacts, parts: int) -> RunFacts:
    """Return the facts about a run in the epochs that its controller counts: parts of passes."""
    milestones = tuple(parts * milestone for milestone in run.milestones)
    return replace(run, epochs=parts * run.epochs, milestones=milestones)


def _milestones(usual: tuple[int, ...], usual_epochs: int, epochs: int) -> tuple[int, ...]:
    """Return the milestones of the data set at their relative places in a run of `epochs`."""
    scaled = {milestone * epochs // usual_epochs for milestone in usual}
    return tuple(sorted(milestone for milestone in scaled if 0 < milestone < epochs))


def _rate(config: TrainConfig, optimizer: str, for_sgd: float) -> float:
    """Return the rate given, or the one known for the optimizer on the data set."""
    if config.lr is not None:
        return config.lr
    if optimizer == "sgd":
        return for_sgd
    rates = RATES.get(optimizer, {})
    rate = rates.get(config.data, rates.get("all"))
    if rate is None:
        raise HessianFlowError(
            f"--optimizer {optimizer} needs --lr: {for_sgd:g}, the rate of {config.data} runs, is"
            " SGD's, and no other is known"
        )
    return rate


def _rule(values: Mapping[str, Any], optimizer: str) -> str | None:
    """Return the default rule by which the rate follows the batch; None: the controller's own.

    It is sqrt for optimizers that divide by the size of the gradients, because their noise follows
    the rate over the root of the batch. A user's own class is taken for one of them, unless it is
    an SGD by name: of the two rules, the root raises the rate less. A controller that finds the
    stable rate keeps its own rule.
    """
    is_adaptive = optimizer in ADAPTIVE or (":" in optimizer and "sgd" not in optimizer.lower())
    if is_adaptive and getattr(_controller(values), "follows_rule", False):
        return "sqrt"
    return None


def _controller(values: Mapping[str, Any]) -> Any:
    """Return a controller of a run, made only to be asked."""
    sizes = {name: values[name] for name in ("batch_size", "max_batch_size")}
    return make(KINDS["controller"], values["controller"], **sizes)


def _images(config: TrainConfig) -> dict[str, Any]:
    """Return the sides that images are cut to and trained at."""
    sides: dict[str, Any] = {}
    own_side = data_set(config.data).side
    side = own_side or config.image_size
    if config.resolution is not None:
        sides["resolutions"] = config.resolutions
        if config.resolutions is None:
            full = side or FILE_SIDE
            sides["resolutions"] = (full * 3 // 4, full)
        elif side is not None and config.resolutions[-1] != side:
            raise HessianFlowError(
                f"--resolutions must end with {side}, the pixels a side of {config.data}, got"
                f" {list(config.resolutions)}"
            )
    if own_side is None and config.image_size is None:
        sides["image_size"] = sides.get("resolutions", (FILE_SIDE,))[-1]
    return sides


def _try(config: RunConfig) -> None:
    """Make the methods once, so that they refuse their options before any data are read."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = make(KINDS["optimizer"], config.optimizer, params=[weight], lr=config.lr)
    make(KINDS["schedule"], config.schedule, epochs=config.epochs, optimizer=optimizer)
    adversary = config.adversary
    if adversary.name != "none":
        method = find(KINDS["adversary"], adversary.name, "adversary")
        if "batches" not in parameters_of(method):  # those that need the data are made with them
            make(KINDS["adversary"], adversary, value_range=(0.0, 1.0), seed=config.seed)
    controller = _controller(vars(config))
    if config.is_dual_batch:
        return
    lacking = [name for name in _CONTROLLER if not hasattr(controller, name)]
    if lacking:
        raise HessianFlowError(
            f"--controller {config.controller.name} is no controller: it lacks"
            f" {' and '.join(lacking)}, which hessianflow.control.controller.Controller has"
        )
    if "eigenvalue" in controller.needs and config.curvature == "off":
        raise HessianFlowError(
            f"--controller {config.controller.name} needs curvature: use --curvature epoch or"
            " needed"
        )


def schedule_of(config: RunConfig) -> Any:
    """Return the schedule of a run as a function of the epochs completed.

    Raises:
        HessianFlowError: The schedule is a scheduler of torch, which needs an optimizer.
    """
    kind = KINDS["schedule"]
    if "optimizer" in parameters_of(find(kind, config.schedule.name, kind.name)):
        raise HessianFlowError(
            f"--schedule {config.schedule.name} needs an optimizer, but a function of epochs is"
            f" wanted here: use one of {', '.join(kind.methods)}"
        )
    return make(kind, config.schedule, epochs=config.epochs)
