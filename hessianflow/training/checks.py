"""Checks of the arguments of a trainer, made before a run: of each alone, and that they fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils.data import Dataset

from hessianflow.interfaces import (
    Adversary,
    BatchController,
    BindsParameters,
    Capped,
    GradientObserver,
    HessianFlowError,
    JoinsRanks,
    MeasuresModel,
    ResizableBatches,
    World,
)
from hessianflow.measuring import check_differentiable
from hessianflow.sharding import check_whole
from hessianflow.training.optimizers import check_followed, check_optimizer

G = TypeVar("G")

LOOP_SIGNALS = frozenset({"train_loss", "epoch_loss", "learning_rate"})
"""Signals that the training loop gives a controller; others come from a probe or an observer."""
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "controller": ("hf.control.ABSA(32, 512)", ("decision", "is_due")),
    "adversary": ("hf.adversarial.FGSM(0.005, value_range=(0, 1))", ("attack", "expose")),
    "probe": (
        "hf.curvature.CurvatureProbe(model, loss_fn, train_data.sample(128))",
        ("__call__", "state_dict"),
    ),
    "observers": ("hf.optim.GradientMoments()", ("on_microbatch", "on_step", "signals")),
    "measurements": ("hf.adversarial.RobustnessWatch(model, batch, 0.01)", ("__call__", "kind")),
    "sinks": ("hf.training.LogSink()", ("write", "close")),
    "state": ("torch.optim.swa_utils.AveragedModel(model)", ("state_dict", "load_state_dict")),
}
"""An example of each part, and the members by which it is told from other objects."""


def check_data(train_data: object, eval_data: object) -> None:
    """Refuse training data whose batch size cannot change, and evaluation data without batches."""
    if not isinstance(train_data, ResizableBatches):
        raise HessianFlowError(
            f"train_data must be batches whose size can change, got {named(train_data)}: use"
            " hf.data.DeviceBatches(inputs, targets, batch_size),"
            " hf.data.AdaptiveBatches(dataset, batch_size) or, for iterable data,"
            " hf.data.StreamBatches(dataset, batch_size)"
        )
    if eval_data is None:
        return
    if eval_data is train_data:
        raise HessianFlowError(
            "eval_data are the training data themselves, which would lose their place: use a copy"
        )
    if isinstance(eval_data, Dataset) or not isinstance(eval_data, Iterable):
        raise HessianFlowError(
            f"eval_data must be batches (inputs, targets), got {named(eval_data)}, which has"
            " single examples at best: use hf.data.AdaptiveBatches(dataset, 256, shuffle=False) or"
            " a DataLoader"
        )
    if isinstance(eval_data, Iterator):
        raise HessianFlowError(
            f"eval_data must be iterated after every epoch, and {named(eval_data)} allows it only"
            " once: use a list of batches"
        )


def as_group(argument: str, value: Any, kind: type[G]) -> G:
    """Return a group of settings, for None that of the defaults, and refuse other values."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise HessianFlowError(
            f"{argument} must be a hf.training.{kind.__name__}(...), got {named(value)}"
        )
    return value


def check_parts(**parts: Any) -> None:
    """Refuse an object that lacks a member of the part that the argument of that name is.

    None stands for no object; each member of a list, or of the mapping of states, is checked.
    """
    for argument, value in parts.items():
        example, members = _PARTS[argument]
        for part in _each(argument, value):
            missing = [member for member in members if not hasattr(part, member)]
            if isinstance(part, type):
                missing.append("an instance")
            if missing:
                raise HessianFlowError(
                    f"{argument} cannot be {named(part)}, which lacks {missing[0]}: pass one such"
                    f" as {example}"
                )


def check_functions(**functions: Any) -> None:
    """Refuse a function that cannot be called; None stands for no function."""
    for argument, value in functions.items():
        if value is not None and not callable(value):
            raise HessianFlowError(f"{argument} must be a function, got {named(value)}")


def as_list(argument: str, value: Any) -> list[Any]:
    """Return the members of an iterable argument as a list, and refuse a single member."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise HessianFlowError(f"{argument} must be a list, got {named(value)}: put it into one")
    return list(value)


def _each(argument: str, value: Any) -> Sequence[Any]:
    if argument == "state":
        if not isinstance(value, Mapping):
            raise HessianFlowError(
                f'state must name its objects, as {{"average": average}}, got {named(value)}'
            )
        return list(value.values())
    if isinstance(value, list):
        return value
    if value is None:
        return []
    return [value]


def named(value: object) -> str:
    """Return a description of a value for an error: the value itself, its class or its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, int, float, bool)):
        return repr(value)
    return f"a {type(value).__name__}"


def check_signals(
    controller: BatchController | None, has_probe: bool, has_observers: bool, num_examples: int
) -> None:
    """Refuse a controller that lacks a probe or observer, or whose cap exceeds the data."""
    if controller is None:
        return
    observed = sorted(controller.needs - LOOP_SIGNALS - {"eigenvalue"})
    if observed and not has_observers:
        raise HessianFlowError(
            f"{type(controller).__name__} decides by {', '.join(observed)}: pass observers=[...]"
            " that measure them, such as hf.optim.GradientMoments() (with accumulate=True for"
            " gradient_sum_sq)"
        )
    if "eigenvalue" in controller.needs and not has_probe:
        raise HessianFlowError(
            f"{type(controller).__name__} decides by the top eigenvalue: pass "
            "probe=hf.curvature.CurvatureProbe(model, loss_fn, train_data.sample(128))"
        )
    if isinstance(controller, Capped) and controller.max_batch_size > num_examples:
        raise HessianFlowError(
            f"max_batch_size {controller.max_batch_size} is larger than the {num_examples} examples"
            " of an epoch"
        )


def check_run(model: nn.Module, optimizer: Optimizer, batch_size: int, num_examples: int) -> None:
    """Refuse a model without a trainable parameter, a foreign optimizer and a bad batch size."""
    check_optimizer(optimizer)
    check_followed(optimizer)
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise HessianFlowError(
            "the model has lazy layers: run it once on a batch before training it"
        )
    check_differentiable(model)
    check_whole(
        model,
        "AdaptiveBatchTrainer",
        "pass the bare model, whose gradients the trainer itself averages over ranks; or keep your"
        ' own loop and measure with hf.monitor or hf.curvature.critical_rate(..., form="forward")',
    )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise HessianFlowError("the model has no trainable parameter: nothing to train")
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise HessianFlowError(
            "the optimizer holds no trainable parameter of the model: build it from this model"
        )
    if not 1 <= batch_size <= num_examples:
        raise HessianFlowError(
            f"batch size {batch_size} must lie between 1 and the {num_examples} examples of an"
            " epoch"
        )


def check_probe(probe: object, model: nn.Module, state: Mapping[str, object]) -> None:
    """Refuse a probe of a model that shares no parameter with the trained one.

    A probe that names no model is accepted, and so is one of a model in the `state` of the run.
    """
    if not isinstance(probe, MeasuresModel) or not isinstance(probe.model, nn.Module):
        return
    measured = probe.model
    kept = [held for held in state.values() if isinstance(held, nn.Module)]
    known = {id(p) for module in (model, *kept) for p in module.parameters()}
    if not any(id(p) in known for p in measured.parameters()):
        raise HessianFlowError(
            f"the probe measures another {type(measured).__name__} than the model that is trained,"
            " with which it shares no parameter: build it from this model (an average of it is"
            " named in Checkpoints(state={...}))"
        )


def idle_adversary(controller: BatchController | None, adversary: Adversary | None) -> str:
    """Return a warning about an adversary that attacks nothing at the start; "" without one."""
    if adversary is None:
        return ""
    if adversary.share == 0:
        return f"{type(adversary).__name__} has a share of 0: it attacks nothing"
    if controller is not None and controller.decision.attack_factor == 0:
        return (
            f"{type(controller).__name__} sets the adversary's share to 0:"
            f" {type(adversary).__name__} attacks nothing until that changes"
        )
    return ""


def unheld_state(run_dir: object, optimizer: Optimizer, state: Mapping[str, object]) -> str:
    """Return a warning about an optimizer whose hooks may keep a state; "" where none is lost."""
    # torch has no public accessor of the hooks.
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if run_dir is None or state or not any(getattr(optimizer, kind, None) for kind in kinds):
        return ""
    return (
        f"{type(optimizer).__name__} has step hooks: what they keep (an average of the weights,"
        " say) is in no checkpoint unless it is named, as"
        ' checkpoints=Checkpoints(state={"average": average})'
    )


def must_pair(model: nn.Module, world: World, microbatch_size: object) -> bool:
    """Return whether all ranks must make the same forward passes, because of a SyncBatchNorm.

    A layer that cannot run on this device is refused, and a size by which ranks may cut their rows
    into different numbers of microbatches.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    if not layers or world.world_size == 1:
        return False
    if isinstance(microbatch_size, int):
        raise HessianFlowError(
            f"microbatch_size {microbatch_size} may cut the parts of ranks differently, and"
            " SyncBatchNorm would wait: leave it out, each part is one pass then"
        )
    if next(model.parameters()).device.type == "cpu":
        raise HessianFlowError(
            "torch's SyncBatchNorm runs on GPUs only, this model is on the cpu: use norm_batch_size"
        )
    return True


def join_parts(
    world: World, observers: Sequence[GradientObserver], adversary: Adversary | None
) -> None:
    """Tell the parts that work on one rank's examples about the other ranks.

    On several ranks, an observer that cannot join them is refused, and a staleness above 0.
    """
    if world.world_size > 1 and adversary is not None and adversary.staleness > 0:
        raise HessianFlowError(
            f"staleness {adversary.staleness} holds batches of one process: use staleness 0 on"
            f" {world.world_size} ranks"
        )
    for observer in observers:
        if isinstance(observer, JoinsRanks):
            observer.join(world)
        elif world.world_size > 1:
            raise HessianFlowError(
                f"{type(observer).__name__} sees the gradients of one rank only: give it a"
                " join(reducer) and let it add up over ranks in on_step, or train with one process"
                f" instead of {world.world_size}"
            )
    if adversary is not None and isinstance(adversary, JoinsRanks):
        adversary.join(world)


def tell_parameters(
    observers: Sequence[GradientObserver], parameters: Sequence[nn.Parameter]
) -> None:
    """Tell the observers that ask for it which parameters' gradients they will be shown."""
    for observer in observers:
        if isinstance(observer, BindsParameters):
            observer.bind(parameters)
