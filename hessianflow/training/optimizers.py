"""Questions that the trainer asks of any optimizer, and which parameters it trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from operator import is_not
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError, SecondOrder, Stateful, WantsClosure
from hessianflow.measuring import unwrap
from hessianflow.training.schedule import required_arguments, with_inner

SHOWN = 3
"""Most names in a message. This default is our choice."""
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

    It then has a true `is_second_order` (as timm's do), or a step that could take the Hessian.
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
    wrapped: list[object] = []
    if depth > 1:
        held = [h for h in getattr(part, "__dict__", {}).values() if isinstance(h, Stateful)]
        wrapped = [h for h in held if not isinstance(h, (nn.Module, type))]
    return with_inner(type(part).__name__, [label(h, depth - 1) for h in wrapped])


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


@dataclass(frozen=True)
class Change:
    """The parameters that are trained from now on and no longer, and a message for the record."""

    added: Sequence[nn.Parameter]
    removed: Sequence[nn.Parameter]
    message: str


class TrainedParameters:
    """The model's trainable parameters, then those that only the optimizer holds, such as a loss's.

    They are read before every step, since layers may be frozen or unfrozen and groups added between
    two steps; a module added to the model is noticed when the optimizer's groups change. `current`
    are those as of the last :meth:`ask`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._held_by_optimizer = self._of_optimizer()
        self._all = self._known()
        self.current = [p for p in self._all if p.requires_grad]

    def ask(self) -> Change | None:
        """Return the change since the last call; None: there is none. Never wait for the device."""
        held = self._of_optimizer()
        if len(held) != len(self._held_by_optimizer) or any(
            map(is_not, held, self._held_by_optimizer)
        ):
            self._held_by_optimizer = held
            self._all = self._known()
        trained = [p for p in self._all if p.requires_grad]
        if len(trained) == len(self.current) and not any(map(is_not, trained, self.current)):
            return None
        before = self.current
        self.current = trained
        return self._change(before, trained)

    def _of_optimizer(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _known(self) -> list[nn.Parameter]:
        return list(dict.fromkeys([*self._model.parameters(), *self._held_by_optimizer]))

    def _change(self, before: Sequence[nn.Parameter], after: Sequence[nn.Parameter]) -> Change:
        added = _without(after, before)
        removed = _without(before, after)
        strangers = _without(added, self._held_by_optimizer)
        kinds = {
            "trained from now on": added,
            "no longer trained": removed,
            "in no group of the optimizer, which does not move it": strangers,
        }
        parts = [f"{kind}: {self._names(members)}" for kind, members in kinds.items() if members]
        return Change(added, removed, "; ".join(parts))

    def _names(self, parameters: Sequence[nn.Parameter]) -> str:
        names = ", ".join(name_of(self._model, p) for p in parameters[:SHOWN])
        left = len(parameters) - SHOWN
        if left > 0:
            names = f"{names} and {left} more"
        return names


def _without(
    parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    known = set(others)
    return [p for p in parameters if p not in known]


def name_of(model: nn.Module, parameter: nn.Parameter) -> str:
    """Return the name of a parameter in the model, or its shape where it is outside the model."""
    for name, own in unwrap(model).named_parameters():
        if own is parameter:
            return name
    return f"a parameter of shape {[*parameter.shape]} outside the model"
