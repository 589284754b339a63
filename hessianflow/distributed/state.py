"""Nested state as one flat array, to send it to ranks that lack it.

A state (dicts, lists, tuples, numbers, strings, tensors) becomes a skeleton, with a slot for every
tensor, and one array of bytes. Sending one large array is an order of magnitude faster than sending
many small ones, through a process group as well as through an object store.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hessianflow.distributed.plain import as_bytes
from hessianflow.interfaces.world import GroupReducer

ByteArray = npt.NDArray[np.uint8]

_ALIGNMENT = 16  # no tensor type is wider, so every slot can be viewed as its type


@dataclass(frozen=True)
class TensorSlot:
    """The position of a tensor's bytes in the array, with type and shape of the tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def pack(state: Any) -> tuple[Any, ByteArray]:
    """Return the skeleton of a nested state, and the bytes of its tensors, one after the other."""
    tensors: list[tuple[TensorSlot, Tensor]] = []
    skeleton = _emptied(state, tensors)
    data = np.empty(_end(tensors), dtype=np.uint8)
    target = torch.from_numpy(data)
    for slot, tensor in tensors:
        target[slot.start : slot.stop] = as_bytes(tensor)
    return skeleton, data


def unpack(skeleton: Any, data: ByteArray) -> Any:
    """Return the nested state, with tensors on the CPU and independent of `data`."""
    # The arrays of an object store are read-only, which torch does not support.
    if not data.flags.writeable:
        data = data.copy()
    return _filled(skeleton, torch.from_numpy(data))


def broadcast_state(reducer: GroupReducer, state: Any) -> Any:
    """Return rank 0's nested state on every rank, and its own object on rank 0."""
    if reducer.rank == 0:
        skeleton, data = pack(state)
        reducer.broadcast((skeleton, data.size))
        if data.size:
            reducer.broadcast_tensor(torch.from_numpy(data))
        return state
    skeleton, size = reducer.broadcast(None)
    carrier = torch.empty(size, dtype=torch.uint8)
    if size:
        reducer.broadcast_tensor(carrier)
    return _filled(skeleton, carrier)


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

    Every rank gathers running statistics of normalisation from its own examples. Afterwards all
    ranks evaluate, measure and save the same model.
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
            values = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value.view(buffer.shape))


def _end(tensors: list[tuple[TensorSlot, Tensor]]) -> int:
    return tensors[-1][0].stop if tensors else 0


def _emptied(value: Any, tensors: list[tuple[TensorSlot, Tensor]]) -> Any:
    """Return the state with slots, and append its tensors to `tensors`."""
    if isinstance(value, Tensor):
        start = -(-_end(tensors) // _ALIGNMENT) * _ALIGNMENT
        stop = start + value.numel() * value.element_size()
        slot = TensorSlot(value.dtype, tuple(value.shape), start, stop)
        tensors.append((slot, value))
        return slot
    if isinstance(value, Mapping):
        return {key: _emptied(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_emptied(item, tensors) for item in value)
    return value


def _filled(value: Any, data: Tensor) -> Any:
    if isinstance(value, TensorSlot):
        return data[value.start : value.stop].view(value.dtype).view(value.shape).clone()
    if isinstance(value, Mapping):
        return {key: _filled(item, data) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, data) for item in value)
    return value
