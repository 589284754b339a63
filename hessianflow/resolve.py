"""From the settings as given to those of a run: every open one is filled, once."""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from hessianflow.bounds import user_path
from hessianflow.config import CHOSEN, RunConfig, TrainConfig, chosen
from hessianflow.contradictions import check_resolved
from hessianflow.data.datasets import FILE_SIDE, data_set
from hessianflow.facts import RunFacts
from hessianflow.fitting import fitted
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import KINDS, Choice, complete, find, follows_rule, make, prefers
from hessianflow.options import parameters_of
from hessianflow.rates import ADAPTIVE, RATES

__all__ = ["resolve", "schedule_of"]

_CONTROLLER = ("decision", "is_due", "needs", "update")
NOT_ON_A_SERVER = ("lr_rule", "curvature_budget")
"""Settings with presets that runs with a parameter server do not have."""


def resolve(given: TrainConfig) -> RunConfig:
    """Fill every setting that was left open.

    A cap left open is never below a batch size given nor above the `train_examples` given, nor are
    probe examples, and milestones left open keep their place in the run. Schedule, adversary and
    `norm_mode` are those that the controller prefers. A `~` at the beginning of a path is the home
    folder, and settings left open are fitted to image files of one's own.

    Raises:
        HessianFlowError: settings that do not go together, or a method that refuses an option.
    """
    if isinstance(given, RunConfig):
        return given
    given = fitted(
        replace(
            given,
            data_dir=user_path(given.data_dir, "--data-dir"),
            run_dir=user_path(given.run_dir, "--run-dir"),
        )
    )
    preset = data_set(given.data).preset
    values = {setting.name: getattr(given, setting.name) for setting in fields(TrainConfig)}
    values |= _sizes(given, preset.settings)
    values |= _preferred(given, preset.schedule)
    optimizer = complete(
        KINDS["optimizer"], given.optimizer, _facts(values), preset.methods, "optimizer"
    )
    values["optimizer"] = optimizer
    inner = innermost(optimizer)
    milestones = _milestones(preset.milestones, preset.settings["epochs"], values["epochs"])
    run = _facts(values, inner, milestones)
    for name in ("schedule", "adversary", "controller"):
        if values[name].name != "none":
            values[name] = complete(KINDS[name], values[name], run, preset.methods, name)
    values["lr"] = _rate(given, inner.name, preset.settings["lr"])
    values["lr_rule"] = given.lr_rule or _rule(values["controller"], inner.name)
    values |= _images(given)
    open_ones = [name for name, value in values.items() if value is None]
    if values["controller"].name == "dual-batch":
        open_ones = [name for name in open_ones if name not in NOT_ON_A_SERVER]
    values |= {name: preset.settings.get(name) for name in open_ones}
    resolved = RunConfig(**values)
    check_resolved(resolved)
    _try(resolved)
    return resolved


def innermost(optimizer: Choice) -> Choice:
    """Return the optimizer that takes the step, inside those that wrap another."""
    while isinstance(optimizer.options.get("base"), Choice):
        optimizer = optimizer.options["base"]
    return optimizer


def _sizes(given: TrainConfig, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that bound each other."""
    examples = given.train_examples or sys.maxsize
    batch = given.batch_size or preset["batch_size"]
    cap = given.max_batch_size
    if given.controller.name == "dual-batch":
        cap = max(batch, cap or 1)  # nothing grows
    if cap is None:
        cap = max(min(preset["max_batch_size"], examples), batch)
    elif cap < batch:
        raise HessianFlowError(
            f"--max-batch-size {cap} is below the batch size {batch} that {given.data} runs start"
            " with: raise the cap or set --batch-size"
        )
    return {
        "batch_size": batch,
        "max_batch_size": cap,
        "epochs": given.epochs or preset["epochs"],
        "probe_examples": given.probe_examples or min(preset["probe_examples"], examples),
    }


def _preferred(given: TrainConfig, usual_schedule: str) -> dict[str, Any]:
    """Return what the controller prefers where nothing else is given."""
    wishes = {"schedule": usual_schedule, "norm_mode": "eval", "adversary": "fgsm"}
    wishes |= prefers(KINDS["controller"], given.controller)
    found: dict[str, Any] = {}
    for name, wish in wishes.items():
        found[name] = getattr(given, name)
        if found[name] is None:
            found[name] = chosen(name, wish) if name in CHOSEN else wish
    return found


def _facts(
    values: Mapping[str, Any],
    optimizer: Choice | None = None,
    milestones: tuple[int, ...] = (),
) -> RunFacts:
    optimizer = optimizer or values["optimizer"]
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


def _milestones(usual: tuple[int, ...], usual_epochs: int, epochs: int) -> tuple[int, ...]:
    """Return the data set's milestones at their places in a run of another length."""
    scaled = {milestone * epochs // usual_epochs for milestone in usual}
    return tuple(sorted(milestone for milestone in scaled if 0 < milestone < epochs))


def _rate(given: TrainConfig, optimizer: str, for_sgd: float) -> float:
    """Return the rate given, or the one that is known for an optimizer on a data set.

    Raises:
        HessianFlowError: none is known, and none is given.
    """
    if given.lr is not None:
        return given.lr
    if optimizer == "sgd":
        return for_sgd
    rates = RATES.get(optimizer, {})
    rate = rates.get(given.data, rates.get("all"))
    if rate is None:
        raise HessianFlowError(
            f"--optimizer {optimizer} needs --lr: {for_sgd:g}, the rate of {given.data} runs, is"
            " SGD's, and no other is known"
        )
    return rate


def _rule(controller: Choice, optimizer: str) -> str | None:
    """Return the rule by which the rate follows the batch where none is given; None: the
    controller's own.

    The noise of optimizers that divide by the size of the gradients follows the rate over the root
    of the batch. A controller that finds the stable rate is left alone.
    """
    if optimizer not in ADAPTIVE or not follows_rule(controller):
        return None
    return "sqrt" if controller.options.get("edge_share") is None else None


def _images(given: TrainConfig) -> dict[str, Any]:
    """Return the sides that images are cut to and trained at.

    Raises:
        HessianFlowError: the images do not have the highest resolution given.
    """
    found: dict[str, Any] = {}
    own_side = data_set(given.data).side
    side = own_side or given.image_size
    if given.resolution is not None:
        found["resolutions"] = given.resolutions
        if given.resolutions is None:
            full = side or FILE_SIDE
            found["resolutions"] = (full * 3 // 4, full)
        elif side is not None and given.resolutions[-1] != side:
            raise HessianFlowError(
                f"--resolutions must end with {side}, the pixels a side of {given.data}, got"
                f" {list(given.resolutions)}"
            )
    if own_side is None and given.image_size is None:
        found["image_size"] = found.get("resolutions", (FILE_SIDE,))[-1]
    return found


def _try(config: RunConfig) -> None:
    """Make the methods once, so that they refuse their options before anything is read.

    Raises:
        HessianFlowError: an option that a method refuses, or a controller that needs curvature in
            a run without.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = make(KINDS["optimizer"], config.optimizer, params=[weight], lr=config.lr)
    make(KINDS["schedule"], config.schedule, epochs=config.epochs, optimizer=optimizer)
    adversary = config.adversary
    if adversary.name != "none":
        method = find(KINDS["adversary"], adversary.name, "adversary")
        if "batches" not in parameters_of(method):  # those that need the data are made with them
            make(KINDS["adversary"], adversary, value_range=(0.0, 1.0), seed=config.seed)
    controller = make(
        KINDS["controller"],
        config.controller,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
    )
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
    """Return the schedule of a run, a function of the epochs done.

    Raises:
        HessianFlowError: the schedule is a scheduler of an optimizer instead.
    """
    kind = KINDS["schedule"]
    if "optimizer" in parameters_of(find(kind, config.schedule.name, kind.name)):
        raise HessianFlowError(
            f"--schedule {config.schedule.name} needs an optimizer, and here a function of epochs"
            f" is needed: use one of {', '.join(kind.methods)}"
        )
    return make(kind, config.schedule, epochs=config.epochs)
