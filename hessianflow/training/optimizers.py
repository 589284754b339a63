"""What the trainer must know about any optimizer, read from the optimizer itself."""

from collections.abc import Iterator
from inspect import signature
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError, SecondOrder, Stateful, WantsClosure
from hessianflow.training.schedule import required_arguments

Gradients = Literal["before", "by closure", "both"]
"""How an optimizer wants its gradients: in `.grad` before its step, by a closure that its step
calls, or the first one before its step and further ones by the closure."""


def check_optimizer(optimizer: Any) -> None:
    """Refuse an object that is not an optimizer with parameter groups, or is several optimizers.

    Raises:
        HessianFlowError: saying what to pass.
    """
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

    Raises:
        HessianFlowError: naming the class, and what its `load_state_dict` lacks.
    """
    held = optimizer.param_groups
    saved = _groups_of(optimizer)
    if len(saved) != len(held):
        return  # a state of another form, which does not tell
    for number, group in enumerate(held):
        if "lr" not in group or not isinstance(saved[number], dict) or "lr" not in saved[number]:
            continue
        before = group["lr"]
        group["lr"] = _UNUSUAL
        try:
            found = _groups_of(optimizer)[number]["lr"]
        finally:
            group["lr"] = before
        if found != _UNUSUAL:
            raise HessianFlowError(
                f"{type(optimizer).__name__} does not step by its own param_groups: a learning rate"
                " that is set there is not in its state_dict(); let its __init__ and its"
                " load_state_dict end with `self.param_groups = inner.param_groups`"
            )


_UNUSUAL = 0.7310585786300049
"""A learning rate that nobody has set."""


def _groups_of(optimizer: Optimizer) -> list[Any]:
    groups = optimizer.state_dict().get("param_groups")
    return groups if isinstance(groups, list) else []


def gradients_wanted(optimizer: Optimizer) -> Gradients:
    """Return how the optimizer wants its gradients.

    It is "by closure" where the step requires one (SAM, LBFGS), or where `wants_closure` is true.
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

    It says so by a true `is_second_order` (as timm's do), or by a step that could be given the
    Hessian instead.
    """
    says_so = isinstance(optimizer, SecondOrder) and bool(optimizer.is_second_order)
    return says_so or "hessian" in signature(optimizer.step).parameters


def without_closure(optimizer: Optimizer, error: Exception) -> HessianFlowError | None:
    """Return the error to raise if a step failed because it had no closure; None for other
    failures."""
    text = f"{type(error).__name__} {error}"
    if "closure" not in text.lower() and "'NoneType' object is not callable" not in text:
        return None
    name = type(optimizer).__name__
    return HessianFlowError(
        f"{name}.step() asks for a closure ({text.strip()}): set `wants_closure = True` on the"
        " optimizer before the trainer is built, if all its gradients are to come from the closure"
    )


def label(part: object, depth: int = 3) -> str:
    """Return the class of a part, and in parentheses those of the stateful parts that it wraps:
    SAM(SGD), RateRule(ABSA)."""
    inner = [label(held, depth - 1) for held in _wrapped(part)] if depth > 1 else []
    name = type(part).__name__
    return f"{name}({', '.join(inner)})" if inner else name


def _wrapped(part: object) -> Iterator[object]:
    for held in vars(part).values() if hasattr(part, "__dict__") else ():
        if isinstance(held, Stateful) and not isinstance(held, (nn.Module, type)):
            yield held


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Put the weights where they are trained, or where they are to be used.

    This calls `train()` or `eval()` of an optimizer that has both (the schedule-free ones) and does
    nothing for all others.
    """
    train, evaluate = getattr(optimizer, "train", None), getattr(optimizer, "eval", None)
    if callable(train) and callable(evaluate):
        train() if training else evaluate()
