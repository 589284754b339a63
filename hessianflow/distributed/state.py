"""Nested state as one flat array, and how it gets to ranks that lack it.

A state (dicts, lists, tuples, numbers, strings, tensors) becomes a skeleton, with a slot for every
tensor, and one array of bytes. One large array travels an order of magnitude faster than many small
ones, through a process group and through an object store alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hessianflow.distributed.reducers import GroupReducer

ByteArray = npt.NDArray[np.uint8]

_ALIGNMENT = 16  # no tensor type is wider, so every slot can be viewed as its type


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor's bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def pack(state: Any) -> tuple[Any, ByteArray]:
    """The skeleton of a nested state, and the bytes of its tensors, one after the other."""
    tensors: list[tuple[TensorSlot, Tensor]] = []
    skeleton = _emptied(state, tensors)
    data = np.empty(tensors[-1][0].stop if tensors else 0, dtype=np.uint8)
    target = torch.from_numpy(data)
    for slot, tensor in tensors:
        target[slot.start : slot.stop] = (
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        )
    return skeleton, data


def unpack(skeleton: Any, data: ByteArray) -> Any:
    """The nested state again, its tensors on the CPU and independent of `data`."""
    # an object store hands out read-only arrays
    writable = data if data.flags.writeable else data.copy()
    return _filled(skeleton, torch.from_numpy(writable))


def broadcast_state(reducer: GroupReducer, state: Any) -> Any:
    """Rank 0's nested state on every rank; what the others pass is ignored. Rank 0 gets its own
    object back."""
    skeleton, data = pack(state) if reducer.rank == 0 else (None, np.empty(0, dtype=np.uint8))
    skeleton, size = reducer.broadcast((skeleton, data.size))
    carrier = torch.from_numpy(data) if reducer.rank == 0 else torch.empty(size, dtype=torch.uint8)
    if size:
        reducer.broadcast_tensor(carrier)
    return state if reducer.rank == 0 else _filled(skeleton, carrier)


def broadcast_module(reducer: GroupReducer, module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, in place."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor):
                carrier = tensor.contiguous()
                reducer.broadcast_tensor(carrier)
                if carrier is not tensor:
                    tensor.copy_(carrier)


def average_buffers(reducer: GroupReducer, module: nn.Module) -> None:
    """Replace floating-point buffers by their mean over ranks and others by rank 0's, in place.

    For running statistics of normalisation, which every rank gathers from its own examples: after
    it all ranks evaluate, measure and save the same model.
    """
    if reducer.world_size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in module.buffers():
        kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    with torch.no_grad():
        for (dtype, _), buffers in kinds.items():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            if dtype.is_floating_point:
                flat = reducer.sum(flat) / reducer.world_size
            else:
                reducer.broadcast_tensor(flat)
            for buffer, value in zip(
                buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True
            ):
                buffer.copy_(value.view(buffer.shape))


def _emptied(value: Any, found: list[tuple[TensorSlot, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        start = -(-(found[-1][0].stop if found else 0) // _ALIGNMENT) * _ALIGNMENT
        stop = start + value.numel() * value.element_size()
        slot = TensorSlot(value.dtype, tuple(value.shape), start, stop)
        found.append((slot, value))
        return slot
    if isinstance(value, Mapping):
        return {key: _emptied(item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_emptied(item, found) for item in value)
    return value


def _filled(value: Any, data: Tensor) -> Any:
    if isinstance(value, TensorSlot):
        return data[value.start : value.stop].view(value.dtype).view(value.shape).clone()
    if isinstance(value, Mapping):
        return {key: _filled(item, data) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, data) for item in value)
    return value
