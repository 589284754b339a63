"""Checks, made before anything runs, that an operator can differentiate a model twice.

Fully sharded and tensor-parallel models hold pieces of their weights. The forward pass gathers
other tensors from them, so autograd finds no path from the loss back to the pieces: their gradient
would be None, and the curvature zero.
"""

from collections.abc import Iterable
from typing import get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from hessianflow.checks import check_choice
from hessianflow.interfaces import HessianFlowError, NormMode
from hessianflow.measuring import check_differentiable
from hessianflow.sharding import is_shard, sharded_by

_WAY_OUT = "measure an unsharded copy: load the full state dict into a plain model"
_FORWARD = (
    'if fully_shard shards the whole model, use form="forward" of critical_rate or form="simple" of'
    f" noise_scale; otherwise {_WAY_OUT}"
)


def check_options(
    model: nn.Module, microbatch_size: int | None, norm_mode: NormMode, takes_shards: bool = False
) -> None:
    """Raise HessianFlowError if a model cannot be measured, or not with these options."""
    check_choice("norm_mode", norm_mode, get_args(NormMode))
    if microbatch_size is not None and microbatch_size < 1:
        raise HessianFlowError(f"microbatch_size must be at least 1 or None, got {microbatch_size}")
    check_measurable(model, takes_shards)
    if microbatch_size is not None and uses_batch_statistics(model, norm_mode):
        cause = "batch normalisation without running statistics"
        if norm_mode == "batch":
            cause = "norm_mode='batch'"
        raise HessianFlowError(
            f"{cause} needs each batch in one pass, got microbatch_size={microbatch_size}; "
            "leave it None or use norm_mode='eval' with running statistics"
        )


def check_measurable(model: nn.Module, takes_shards: bool = False) -> None:
    """Raise HessianFlowError if weights have no values, do not exist yet or are in shards.

    Args:
        model: the model.
        takes_shards: whether shards made by `fully_shard` are accepted.
    """
    check_differentiable(model)
    for name, module in model.named_modules():
        if sharded_by(module) and not takes_shards:
            raise HessianFlowError(
                f"{name or 'the model'} is sharded by {sharded_by(module)} (FSDP), and autograd"
                f" does not reach the shards; {_FORWARD}"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                _check_usable(f"{name}.{key}".lstrip("."), module, tensor, takes_shards)


def _check_usable(name: str, module: nn.Module, tensor: Tensor, takes_shards: bool) -> None:
    if is_lazy(tensor):
        raise HessianFlowError(
            f"{name} of {type(module).__name__} has no shape yet; run the model once on a batch"
        )
    if tensor.is_meta:
        raise HessianFlowError(f"{name} is on the meta device and has no values; load them first")
    if is_shard(tensor) and not takes_shards:
        raise HessianFlowError(
            f"{name} is a DTensor, of which this process holds a piece; {_WAY_OUT}"
        )


def check_present(model: nn.Module, names: Iterable[str], parameters: Iterable[Tensor]) -> None:
    """Raise HessianFlowError if parameters were frozen or replaced since they were selected."""
    held = {id(tensor) for module in model.modules() for tensor in module._parameters.values()}
    for name, parameter in zip(names, parameters, strict=True):
        if not parameter.requires_grad:
            raise HessianFlowError(
                f"{name} was frozen after the operator was made; make a new operator"
            )
        if id(parameter) not in held:
            raise HessianFlowError(
                f"{name} was replaced in the model after the operator was made; make a new operator"
            )


def uses_batch_statistics(model: nn.Module, norm_mode: NormMode) -> bool:
    """Return whether a layer normalises by the batch that it sees, which must then not be cut.

    Layers without running statistics do so in either mode. Only torch's layers are recognised.
    """
    return any(
        isinstance(module, _BatchNorm) and (norm_mode == "batch" or module.running_mean is None)
        for module in model.modules()
    )
