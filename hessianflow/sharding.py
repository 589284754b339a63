"""Models whose weights are in shards, and the shard of a weight that this process holds.

Nothing here imports torch's distributed packages: if they are not loaded, no object can be of their
classes.
"""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hessianflow.interfaces import HessianFlowError

_FSDP = "torch.distributed.fsdp"


def is_shard(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, of which each process holds a piece."""
    tensors = "torch.distributed.tensor"
    return isinstance(
        tensor, _loaded((tensors, "DTensor"), ("torch.distributed._tensor", "DTensor"))
    )


def own_part(tensor: Tensor) -> Tensor:
    """Return the piece of a DTensor that this process holds, detached and in place.

    Any other tensor is returned itself.
    """
    if not is_shard(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def sharded_by(module: nn.Module) -> str:
    """Return the name of FSDP's class or function that shards a module; "" if it is not sharded."""
    if isinstance(module, _loaded((_FSDP, "FullyShardedDataParallel"))):
        return "FullyShardedDataParallel"
    if isinstance(module, _loaded((_FSDP, "FSDPModule"))):
        return "fully_shard"
    return ""


def check_whole(model: nn.Module, name: str, way_out: str) -> None:
    """Raise HessianFlowError if any weight of a model is in shards.

    Args:
        model: the model.
        name: what cannot use it.
        way_out: what to do instead.
    """
    wrappers: Iterable[str] = filter(None, map(sharded_by, model.modules()))
    wrapper = next((f"{wrapper} (FSDP)" for wrapper in wrappers), "")
    if not wrapper and any(map(is_shard, model.parameters())):
        wrapper = "DTensor (tensor parallelism)"
    if wrapper:
        raise HessianFlowError(f"{name} cannot use a model sharded by {wrapper}: {way_out}")


def _loaded(*names: tuple[str, str]) -> tuple[type[Any], ...]:
    """Return the classes whose modules are imported; no object can be of the other classes."""
    kinds = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in kinds if kind is not None)
