"""The displacement that an optimizer's next step would make, from a step of a copy.

The copy steps copies of the weights. The optimizer, its state and the weights themselves are never
written to, so nothing has to be put back and no kept graph is lost. The copy has no step hooks, and
a learning-rate schedule that watches the optimizer does not see its step.

The torch and LARS optimizers that treat every tensor by itself are copied and stepped one tensor at
a time: beyond the displacement that takes the memory of the largest tensor and its state. Others
(global norms, batched matrices, unknown ones) step whole, which takes the memory of the weights,
their gradients and the optimizer's state once more while the step is made.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from hessianflow.curvature.geometry import stepped_base
from hessianflow.curvature.surroundings import without_hooks
from hessianflow.curvature.vectors import unflatten
from hessianflow.interfaces import HessianFlowError
from hessianflow.sharding import is_shard, own_part

BY_ENTRY = {
    "torch.optim.sgd.SGD",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.rmsprop.RMSprop",
}
"""Classes whose step of one entry depends on no other entry, so that shards can be stepped."""

BY_TENSOR = BY_ENTRY | {"hessianflow.optim.lars.LARS"}
"""Classes whose step of one tensor depends on no other; subclasses may differ, and step whole."""


def displacement(optimizer: Optimizer, parameters: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return w - w' for the weights w' after the optimizer's next step, shape [size].

    SAM and Extrapolation are taken for the optimizer that they step. It is 0 for parameters that
    the optimizer does not step. Call it where the states of random generators are put back.

    Args:
        optimizer: any optimizer that steps without a closure.
        parameters: the parameters, in the order of the gradient. Of DTensors, this rank's shards
            are stepped.
        gradient: the gradient to step with, shape [size]; it is not changed.

    Raises:
        HessianFlowError: the optimizer needs a closure, cannot be copied, cannot step shards, or
            its step fails.
    """
    base, _ = stepped_base(optimizer)
    _check_step(base)
    parts = [own_part(parameter) for parameter in parameters]
    gradients = dict(zip(parameters, unflatten(gradient, parts), strict=True))
    own = [p for group in base.param_groups for p in group["params"]]
    blocks = [own]
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if kind not in BY_ENTRY and any(map(is_shard, own)):
        raise HessianFlowError(
            f"{type(base).__name__} cannot step a shard of a DTensor (FSDP) by itself: use SGD,"
            ' Adam, AdamW or RMSprop of torch, whose updates form="forward" measures on shards'
        )
    if kind in BY_TENSOR:
        blocks = [[parameter] for parameter in own if parameter in gradients]
    moved = torch.zeros_like(gradient)
    pieces = dict(zip(parameters, _views(moved, parts), strict=True))
    for block in blocks:
        stepped = _stepped(base, block, gradients)
        with torch.no_grad():
            for parameter, after in zip(block, stepped, strict=True):
                if parameter in pieces:
                    pieces[parameter].copy_(own_part(parameter)).sub_(after)
    return moved


def _views(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return views in the shapes of the parameters, in the type of the vector."""
    pieces = torch.split(vector, [parameter.numel() for parameter in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _check_step(optimizer: Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise HessianFlowError(
            f"{type(optimizer).__name__} computes gradients within its step, so one gradient gives"
            " no update to measure along; pass the optimizer that it steps"
        )


def _stepped(
    optimizer: Optimizer, block: Sequence[Tensor], gradients: dict[Tensor, Tensor]
) -> list[Tensor]:
    """Return copies of some parameters after a step of a copy of the optimizer."""
    copies = [own_part(parameter).detach().clone() for parameter in block]
    for parameter, stand_in in zip(block, copies, strict=True):
        stand_in.requires_grad_(parameter.requires_grad)
        if parameter.requires_grad and parameter in gradients:
            # Optimizers may write to gradients, too.
            stand_in.grad = gradients[parameter].clone().view_as(stand_in)
    versions = [parameter._version for parameter in block]
    name = type(optimizer).__name__
    everyones = [torch_optimizer.__dict__.get(f"_global_optimizer_{when}_hooks") for when in WHEN]
    try:
        twin = _twin(optimizer, block, copies)
        with without_hooks(everyones):
            # The class's step, because schedules replace that of the object.
            type(twin).step(twin)
    except Exception as error:  # a foreign optimizer may raise anything
        raise HessianFlowError(
            f"a copy of {name} cannot step, so its update is not known:"
            f" {type(error).__name__}: {error}"
        ) from error
    if [parameter._version for parameter in block] != versions:
        raise HessianFlowError(
            f"a copy of {name} moved the weights themselves, which it holds outside of its groups;"
            " do not measure along its update"
        )
    return copies


WHEN = ("pre", "post")


def _twin(optimizer: Optimizer, block: Sequence[Tensor], copies: Sequence[Tensor]) -> Optimizer:
    """Return a copy of an optimizer that steps these copies, with all else that it holds copied."""
    # Whatever refers to a parameter refers to its copy in the twin: deepcopy looks up its memo.
    memo: dict[int, Any] = {id(p): stand_in for p, stand_in in zip(block, copies, strict=True)}
    held = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("step", "state", "param_groups") and not name.endswith("_hooks")
    }
    held["param_groups"] = [
        {**group, "params": [p for p in group["params"] if id(p) in memo]}
        for group in optimizer.param_groups
        if any(id(p) in memo for p in group["params"])
    ]
    held["state"] = type(optimizer.state)(
        optimizer.state.default_factory,
        {
            key: _own_state(value)
            for key, value in optimizer.state.items()
            if not isinstance(key, Tensor) or id(key) in memo
        },
    )
    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update(copy.deepcopy(held, memo))
    hooks = [name for name in vars(optimizer) if name.endswith("_hooks")]
    vars(twin).update({name: OrderedDict() for name in hooks})
    return twin


def _own_state(state: Any) -> Any:
    """Return the state of one parameter, with this rank's shards in place of DTensors."""
    if not isinstance(state, dict) or not any(map(is_shard, state.values())):
        return state
    return {
        name: own_part(value) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
