"""Copies in float64 that stand in for a model's weights and buffers during a comparison."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 or complex128; integers and wide types are returned as is."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


@contextmanager
def copied(holders: Sequence[nn.Module], parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let copies stand in for weights and buffers of some modules; yield those of `parameters`."""
    modules = list(dict.fromkeys(module for holder in holders for module in holder.modules()))
    originals = [
        (module, dict(module._parameters), dict(module._buffers), _plain_attributes(module))
        for module in modules
    ]
    copies = {id(parameter): _copy(parameter) for parameter in parameters}
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    stand_in = copies.setdefault(id(parameter), _constant(parameter))
                    module._parameters[name] = stand_in  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), _copy(buffer))
        yield [copies[id(parameter)] for parameter in parameters]
    finally:
        for module, weights, buffers, attributes in originals:
            module._parameters.update(weights)
            module._buffers.update(buffers)
            module.__dict__.update(attributes)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return plain tensors and lists (recurrent layers list their weights) that may be replaced."""
    return {key: value for key, value in vars(module).items() if isinstance(value, (Tensor, list))}


def _constant(parameter: Tensor) -> Tensor:
    """Return a stand-in for a parameter that is held constant: itself unless it is widened."""
    if parameter.dtype in _WIDER:
        return _copy(parameter)
    return parameter


def _copy(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"a {type(tensor).__name__} cannot be copied into another type")
    copy = tensor.detach().to(_WIDER.get(tensor.dtype, tensor.dtype), copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, tensor.requires_grad)
    return copy
