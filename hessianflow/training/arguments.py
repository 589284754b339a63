"""Checks of the single arguments of a trainer; :mod:`checks` tells whether they fit together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch.utils.data import Dataset

from hessianflow.interfaces import HessianFlowError, ResizableBatches

G = TypeVar("G")

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
            " hf.data.DeviceBatches(inputs, targets, batch_size) or"
            " hf.data.AdaptiveBatches(dataset, batch_size)"
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
    """Refuse an object that lacks a member of the part that it is passed as.

    Args:
        parts: the objects, by the name of the argument. None stands for no object; each member of
            a list, or of the mapping of states, is checked.
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
