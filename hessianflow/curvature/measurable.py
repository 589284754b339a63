"""Which models an operator can differentiate twice, told before anything runs.

Fully sharded and tensor-parallel models hold pieces of their weights. The forward pass uses other
tensors, gathered for its duration, so autograd finds no path from the loss back to the pieces:
their gradient would be None, and the curvature zero.
"""

import sys
from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessianflow.interfaces import HessianFlowError, NormMode
from hessianflow.measuring import check_differentiable

_WAY_OUT = "measure an unsharded copy: load the full state dict into a plain model"


def check_options(model: nn.Module, microbatch_size: int | None, norm_mode: NormMode) -> None:
    """Refuse options that the (unwrapped) model cannot be run with.

    Raises:
        HessianFlowError: an option is out of range; each batch has its own statistics but would be
            cut into microbatches; or the model cannot be measured (:func:`check_measurable`).
    """
    if norm_mode not in get_args(NormMode):
        raise HessianFlowError(
            f"norm_mode must be one of {', '.join(get_args(NormMode))}, got {norm_mode!r}"
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise HessianFlowError(f"microbatch_size must be at least 1 or None, got {microbatch_size}")
    check_measurable(model)
    if microbatch_size is not None and uses_batch_statistics(model, norm_mode):
        cause = (
            "norm_mode='batch'"
            if norm_mode == "batch"
            else "batch normalisation without running statistics"
        )
        raise HessianFlowError(
            f"{cause} needs each batch in one pass, got microbatch_size={microbatch_size}; "
            "leave it None or use norm_mode='eval' with running statistics"
        )


def check_measurable(model: nn.Module) -> None:
    """Refuse a model whose weights are in shards, have no values, or do not exist yet.

    Raises:
        HessianFlowError: with the name of the wrapper or of the weight, and the way out.
    """
    check_differentiable(model)
    sharding, pieces = _sharding(), _pieces()
    for module in model.modules():
        if isinstance(module, sharding):
            raise HessianFlowError(
                f"{_name(model, module) or 'the model'} is sharded by {_wrapper(module)}, and"
                f" autograd does not reach the shards; {_WAY_OUT}"
            )
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and (
                    isinstance(tensor, pieces) or is_lazy(tensor) or tensor.is_meta
                ):
                    raise HessianFlowError(
                        _unusable(f"{_name(model, module)}.{key}".lstrip("."), module, tensor)
                    )


def _unusable(name: str, module: nn.Module, tensor: Tensor) -> str:
    if is_lazy(tensor):
        return f"{name} of {type(module).__name__} has no shape yet; run the model once on a batch"
    if tensor.is_meta:
        return f"{name} is on the meta device and has no values; load them first"
    return f"{name} is a DTensor, of which this process holds a piece; {_WAY_OUT}"


def _name(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, found in model.named_modules() if found is module), "")


def check_present(model: nn.Module, names: Iterable[str], parameters: Iterable[Tensor]) -> None:
    """Refuse selected parameters that were frozen, or replaced in the model, after the operator was
    made.

    Raises:
        HessianFlowError: with the name of the first one.
    """
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
    """Return whether some layer normalises by the batch that it sees, so that the batch must not be
    cut.

    Layers without running statistics do so in either mode. Only torch's layers can be recognised.
    """
    layers = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    return any(norm_mode == "batch" or layer.running_mean is None for layer in layers)


def _sharding() -> tuple[type[Any], ...]:
    """Return the classes of sharded modules; empty as long as nobody has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found = (getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule"))
    return tuple(kind for kind in found if kind is not None)


def _pieces() -> tuple[type[Any], ...]:
    places = (
        sys.modules.get(name) for name in ("torch.distributed.tensor", "torch.distributed._tensor")
    )
    found = (getattr(place, "DTensor", None) for place in places)
    return tuple(kind for kind in found if kind is not None)


def _wrapper(module: nn.Module) -> str:
    is_first = any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)
    return "FullyShardedDataParallel" if is_first else "fully_shard"
