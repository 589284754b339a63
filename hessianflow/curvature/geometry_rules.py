"""The rules by which known optimizers step their parameters, in a table by the class.

geometry.py derives the thresholds and says what they mean.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.curvature.vectors import vector_dtype


class Scaling(NamedTuple):
    """How an optimizer steps one parameter.

    Attributes:
        inverse: the diagonal of P^-1, in the shape of the parameter, or one factor of the identity.
        threshold: see the module.
        decay: weight decay that is added to the gradient.
    """

    inverse: Tensor | float
    threshold: float
    decay: float = 0.0


Group = dict[str, Any]
Rule = Callable[[Any, Group], dict[Tensor, Scaling]]
"""Returns how a group's parameters are stepped, by parameter; those never stepped are missing."""

T = TypeVar("T")


SMALLEST = 1e-6
"""Stands for 0 in a threshold, by which shares are divided."""


def rate_of(group: Group) -> float:
    """Return the learning rate of a group, or 1 if it has none."""
    rate = group.get("lr")
    if rate is None:
        return 1.0
    return float(rate)  # waits for the device where the rate is a tensor there


def _heavy(momentum: float, nesterov: bool = False, dampening: float = 0.0) -> float:
    """Return the threshold of v <- m v + (1 - d) g; w <- w - eta v (or g + m v)."""
    if nesterov:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum) / max(1 - dampening, SMALLEST)


def _averaged(beta: float, shrinking: float) -> float:
    """Return the threshold of m <- b m + (1 - b) g; w <- (1 - shrinking) w - eta m."""
    # Beyond 2 the decay diverges by itself, and a small threshold makes the share say so.
    return max(2 - shrinking, SMALLEST) * (1 + beta) / (1 - beta)


def _sgd(_optimizer: Optimizer, group: Group) -> dict[Tensor, Scaling]:
    momentum = group["momentum"]
    dampening = 0.0
    if momentum:  # without momentum torch leaves the dampening out
        dampening = group["dampening"]
    threshold = _heavy(momentum, group["nesterov"], dampening)
    scaling = Scaling(1.0, threshold, float(group["weight_decay"]))
    return dict.fromkeys(group["params"], scaling)


def _adam(optimizer: Optimizer, group: Group) -> dict[Tensor, Scaling]:
    beta1, beta2 = group["betas"]
    decay = float(group["weight_decay"])
    # In older versions of torch AdamW is a class of its own, without this entry.
    if group.get("decoupled_weight_decay", not isinstance(optimizer, torch.optim.Adam)):
        threshold = _averaged(float(beta1), rate_of(group) * decay)
        decay = 0.0
    else:
        threshold = _averaged(float(beta1), 0.0)
    moment = "exp_avg_sq"
    if group["amsgrad"]:
        moment = "max_exp_avg_sq"
    return {
        parameter: Scaling(_inverse(state, moment, group["eps"], float(beta2)), threshold, decay)
        for parameter, state in _stepped(optimizer, group, moment)
    }


def _rmsprop(optimizer: Optimizer, group: Group) -> dict[Tensor, Scaling]:
    threshold = _heavy(group["momentum"])
    found = {}
    for parameter, state in _stepped(optimizer, group, "square_avg"):
        root = _wide(state["square_avg"])
        if group["centered"]:
            root = root - _wide(state["grad_avg"]).square()
        inverse = root.sqrt().add_(group["eps"]).reciprocal_()
        found[parameter] = Scaling(inverse, threshold, float(group["weight_decay"]))
    return found


def _lamb(optimizer: Optimizer, group: Group) -> dict[Tensor, Scaling]:
    beta1, beta2 = group["betas"]
    found = {}
    for parameter, state in _stepped(optimizer, group, "exp_avg_sq"):
        inverse = _inverse(state, "exp_avg_sq", group["eps"], beta2)
        is_matrix = parameter.ndim > 1
        decay = 0.0
        if is_matrix or group["decay_vectors"]:
            decay = group["weight_decay"]
        ratio = 1.0
        if is_matrix or group["adapt_vectors"]:
            first = _wide(state["exp_avg"]) / (1 - beta1 ** float(state["step"]))
            ratio = _ratio(parameter, first * inverse + decay * parameter)
        threshold = _averaged(beta1, rate_of(group) * ratio * decay)
        found[parameter] = Scaling(inverse * ratio, threshold)
    return found


def _lars(optimizer: Any, group: Group) -> dict[Tensor, Scaling]:
    threshold = _heavy(group["momentum"], group["nesterov"])
    found = {}
    for parameter, ratio in optimizer.layer_ratios(group).items():
        decay = 0.0
        if parameter.ndim > 1 or group["decay_vectors"]:
            decay = float(group["weight_decay"])
        found[parameter] = Scaling(ratio, threshold, decay)
    return found


def _stepped(
    optimizer: Optimizer, group: Group, moment: str
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the parameters of a group that have this moment, with their states."""
    # `get`, because reading a missing state by index would make one.
    states = [(p, optimizer.state.get(p, {})) for p in group["params"]]
    # A fused step that a GradScaler skipped leaves a state of zero steps.
    return [(p, state) for p, state in states if moment in state and float(state["step"]) > 0]


def _inverse(state: Mapping[str, Any], moment: str, eps: Any, beta2: float) -> Tensor:
    """Return 1 / (sqrt(v_hat) + eps), with the bias of the second moment taken out."""
    # The number of steps may be on the device, which this then waits for.
    bias = 1 - beta2 ** float(state["step"])
    root: Tensor = (_wide(state[moment]) / bias).sqrt_()
    return root.add_(eps).reciprocal_()


def _ratio(parameter: Tensor, direction: Tensor) -> float:
    """Return |w| / |u|, or 1 where one of them is 0."""
    weight = float(_wide(parameter).norm())
    length = float(direction.norm())
    if weight == 0 or length == 0:
        return 1.0
    return weight / length


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in a type whose squares do not overflow."""
    return tensor.detach().to(vector_dtype([tensor]))


RULES: Mapping[str, Rule] = {
    "torch.optim.sgd.SGD": _sgd,
    "torch.optim.adam.Adam": _adam,
    "torch.optim.adamw.AdamW": _adam,
    "torch.optim.rmsprop.RMSprop": _rmsprop,
    "hessianflow.optim.lamb.LAMB": _lamb,
    "hessianflow.optim.lars.LARS": _lars,
}
"""The rule of every known class, by its full name: this package does not import the optimizers."""

WRAPPERS: Mapping[str, str] = {
    "hessianflow.optim.sam.SAM": (
        "along the base: SAM lowers the edge by the factor 1 + rho lambda / |g|"
    ),
    "hessianflow.optim.extrapolation.Extrapolation": (
        "along the base: a look-ahead raises the edge by up to 1 / (1 - lookahead_lr lambda)"
    ),
}
"""The optimizers that step another one, with what that changes."""


def known(kind: type, table: Mapping[str, T]) -> T | None:
    """Return the entry of the nearest class that `kind` is or is derived from, or None.

    A class that steps in another way than the one in the table is not taken for it.
    """
    for parent in kind.__mro__:
        entry = table.get(f"{parent.__module__}.{parent.__qualname__}")
        if entry is not None:
            if _step_of(kind) is _step_of(parent):
                return entry
            return None
    return None


def _step_of(kind: type) -> Any:
    """Return the step of a class without what torch wraps around the step of every class."""
    return inspect.unwrap(kind.step)  # type: ignore[attr-defined]
