"""Batch normalisation with fixed statistics as one multiply-add, for attacks on a processor.

With running statistics and frozen parameters, normalisation is  y = scale x + shift,  scale = weight / sqrt(var + eps),
shift = bias - mean scale. Torch's own kernel does more in the backward pass (it serves the parameters, too): on a
ResNet-20 an input gradient takes 10 to 17 % longer with it. On a GPU, where launches count, it is the faster one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Fixed(_BatchNorm):
    """A batch-normalisation layer in evaluation mode; parameters, buffers and hooks are another layer's own."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, layer: _BatchNorm) -> "_Fixed":
        assert layer.running_mean is not None
        assert layer.running_var is not None
        made = cls.__new__(cls)  # without the cost of fresh parameters: an attack is made at every step
        made.__dict__.update(layer.__dict__)
        with torch.no_grad():
            scale = torch.rsqrt(layer.running_var + layer.eps)
            scale = scale if layer.weight is None else scale * layer.weight
            shift = -layer.running_mean * scale
            made.__dict__["scale"] = scale
            made.__dict__["shift"] = shift if layer.bias is None else shift + layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != self.scale.dtype:  # under autocast: torch's kernel computes in float32 inside
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        shape = (1, -1, *(1 for _ in input.shape[2:]))
        return torch.addcmul(self.shift.view(shape), input, self.scale.view(shape))


@contextmanager
def fixed_normalisation(model: nn.Module) -> Iterator[None]:
    """While active, layers in evaluation mode on a processor run in this form; they come back afterwards."""
    places = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent._modules.items()  # all places of a layer, also those that share it
        if isinstance(layer, _BatchNorm) and _is_fixed(layer)
    ]
    for parent, name, layer in places:
        setattr(parent, name, _Fixed.of(layer))
    try:
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def _is_fixed(layer: _BatchNorm) -> bool:
    # Another class may do anything in its forward, unless it says that in evaluation mode it is torch's own.
    plain = type(layer) in _TYPES or getattr(layer, "is_torchs_in_evaluation", False)
    return plain and not layer.training and layer.running_mean is not None and layer.running_mean.device.type == "cpu"
