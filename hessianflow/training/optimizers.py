"""Questions that the trainer asks of any optimizer, answered from the optimizer itself."""

from collections.abc import Iterator
from inspect import signature
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError, SecondOrder, Stateful, WantsClosure
from hessianflow.training.schedule import required_arguments, with_inner

Gradients = Literal["before", "by closure", "both"]
"""The way an optimizer takes gradients: in `.grad` before its step, by a closure that its step
calls, or the first before its step and the others by the closure."""


def check_optimizer(optimizer: Any) -> None:
    """Refuse an object that is not an optimizer with parameter groups, or is several optimizers."""
    if isinstance(optimizer, (list, tuple)) and all(hasattr(part, "step") for part in optimizer):
        raise HessianFlowError(
            f"optimizer must be one optimizer, got {len(optimizer)} of them: put them behind one"
            " whose step() steps all and whose param_groups are those of all"
        )
    groups = getattr(optimizer, "param_groups", None)
    has_groups = isinstance(groups, list) and all(
        isinstance(group, dict) and "params" in group for group in groups
    )
    methods = ("step", "state_dict", "load_state_dict")
    if not has_groups or not all(callable(getattr(optimizer, name, None)) for name in methods):
        raise HessianFlowError(
            "optimizer must be a torch optimizer, with param_groups, step, state_dict and"
            f" load_state_dict, got a {type(optimizer).__name__}: pass one such as"
            " torch.optim.SGD(model.parameters(), lr=0.1)"
        )


def check_followed(optimizer: Optimizer) -> None:
    """Refuse an optimizer that wraps another one but no longer shares its groups.

    A value set in its groups, such as a learning rate, would be recorded and never used. The state
    that an optimizer saves tells which groups it steps by.
    """
    held = optimizer.param_groups
    saved = _groups_of(optimizer)
    if len(saved) != len(held):
        return  # A state of another form does not tell.
    for number, group in enumerate(held):
        if "lr" not in group or not isinstance(saved[number], dict) or "lr" not in saved[number]:
            continue
        before = group["lr"]
        group["lr"] = _UNUSUAL
        try:
            rate = _groups_of(optimizer)[number]["lr"]
        finally:
            group["lr"] = before
        if rate != _UNUSUAL:
            raise HessianFlowError(
                f"{type(optimizer).__name__} does not step by its own param_groups: a learning rate"
                " that is set there is not in its state_dict(); let its __init__ and its"
                " load_state_dict end with `self.param_groups = inner.param_groups`"
            )


_UNUSUAL = 0.7310585786300049
"""A learning rate that no user sets."""


def _groups_of(optimizer: Optimizer) -> list[Any]:
    groups = optimizer.state_dict().get("param_groups")
    if not isinstance(groups, list):
        return []
    return groups


def gradients_wanted(optimizer: Optimizer) -> Gradients:
    """Return the way the optimizer takes gradients.

    This is "by closure" where the step requires one (SAM, LBFGS), or where `wants_closure` is true.
    It is "both" for an optimizer with the two half steps of common SAM packages, `first_step` and
    `second_step`: its step moves along the gradient in `.grad`, and the closure gives the second.
    """
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        return "both"
    asks = isinstance(optimizer, WantsClosure) and optimizer.wants_closure
    if asks or "closure" in required_arguments(optimizer.step):
        return "by closure"
    return "before"


def wants_graph(optimizer: Optimizer) -> bool:
    """Return whether the optimizer differentiates the gradients again.

    Such an optimizer has a true `is_second_order` (as timm's do), or a step that could take the
    Hessian instead.
    """
    says_so = isinstance(optimizer, SecondOrder) and bool(optimizer.is_second_order)
    return says_so or "hessian" in signature(optimizer.step).parameters


def without_closure(optimizer: Optimizer, error: Exception) -> HessianFlowError | None:
    """Return the error for a step that failed because it had no closure; None: it had another."""
    text = f"{type(error).__name__} {error}"
    if "closure" not in text.lower() and "'NoneType' object is not callable" not in text:
        return None
    name = type(optimizer).__name__
    return HessianFlowError(
        f"{name}.step() asks for a closure ({text.strip()}): set `wants_closure = True` on the"
        " optimizer before the trainer is built, if all its gradients are to come from the closure"
    )


def label(part: object, depth: int = 3) -> str:
    """Return the class of a part and those of the stateful parts that it wraps: SAM(SGD)."""
    inner: list[str] = []
    if depth > 1:
        inner = [label(held, depth - 1) for held in _wrapped(part)]
    return with_inner(type(part).__name__, inner)


def _wrapped(part: object) -> Iterator[object]:
    for held in getattr(part, "__dict__", {}).values():
        if isinstance(held, Stateful) and not isinstance(held, (nn.Module, type)):
            yield held


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Call `train()` or `eval()` of an optimizer that has both (the schedule-free ones).

    They swap the weights that are trained and those that are to be used.
    """
    train = getattr(optimizer, "train", None)
    evaluate = getattr(optimizer, "eval", None)
    if not callable(train) or not callable(evaluate):
        return
    if training:
        train()
    else:
        evaluate()
