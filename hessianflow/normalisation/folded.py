"""Batch normalisation with running statistics, folded into the weights of the convolution before
it.

    norm(conv(x; w, b)) = conv(x; s w, s (b - mean) + bias),    s = weight / sqrt(var + eps)

The same function of the same parameters, so every derivative by them is the same up to rounding;
but no pass over the activations is spent on normalisation, and none is kept for it. Measured on a
ResNet-20 on a processor: an input gradient of 25 images takes 18 % less time (in bf16 17 %), a
product with the Hessian 11 % less, with its graph 14 %.

Folded are neighbours in a plain `nn.Sequential` only, where it is certain that nothing else sees
what is between them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FoldedSequence(nn.Sequential):
    """Stands in for a plain sequence; layers, parameters and hooks are that sequence's own.

    A slice of it, which `nn.Sequential` makes from its class and some of its layers, folds nothing.

    Attributes:
        pairs: by the name of a convolution, the convolution and the normalisation that follows it.
        absorbed: names of those normalisations.
    """

    pairs: Mapping[str, tuple[_ConvNd, _BatchNorm]] = MappingProxyType({})
    absorbed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, sequence: nn.Module) -> "FoldedSequence | None":
        """The sequence in this form; None if there is nothing to fold in it, or it is no plain
        sequence."""
        # A compiled (scripted, traced) module is no `nn.Sequential`, and its class cannot be asked
        # for `forward`.
        if (
            not isinstance(sequence, nn.Sequential)
            or type(sequence).forward is not nn.Sequential.forward
        ):
            return None
        found = [
            (first, second, pair)
            for (first, one), (second, other) in pairwise(sequence._modules.items())
            if (pair := _pair(one, other)) is not None
        ]
        if not found:
            return None
        form = _form(type(sequence))  # type: ignore[arg-type]
        made = form.__new__(form)  # without the cost of a new module
        made.__dict__.update(sequence.__dict__)
        made.__dict__["pairs"] = {first: pair for first, _, pair in found}
        made.__dict__["absorbed"] = frozenset(second for _, second, _ in found)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """What the sequence gives; layer by layer where others build its graph again."""
        watched = graph_is_recomputed()
        for name, layer in self._modules.items():
            if name in self.pairs and not watched:
                convolution, norm = self.pairs[name]
                input = convolution._conv_forward(input, *_folded(convolution, norm))
            elif name not in self.absorbed or watched:
                assert layer is not None
                input = layer(input)
        return input


@cache
def _form(kind: type[Any]) -> type[FoldedSequence]:
    """A class that is `kind`, too: its other methods may be used, and its instances told by their
    type."""
    return (
        FoldedSequence if kind is nn.Sequential else type(kind.__name__, (FoldedSequence, kind), {})
    )


@contextmanager
def folded_normalisation(model: nn.Module) -> Iterator[nn.Module]:
    """While active, plain sequences run folded wherever the model uses them; they come back
    afterwards.

    Yields:
        What to call: the model, or its stand-in where the model itself is such a sequence.
    """
    parents = list(model.modules())
    stand_ins = {
        parent: folded for parent in parents if (folded := FoldedSequence.of(parent)) is not None
    }
    places = [
        (parent, name, layer)
        for parent in parents
        # all places of a layer, also those that share it
        for name, layer in parent._modules.items()
        if layer in stand_ins
    ]
    try:
        # Past nn.Module's own, slow way to set an attribute: an attack is made at every step.
        for parent, name, layer in places:
            parent._modules[name] = stand_ins[layer]
        yield stand_ins.get(model, model)
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer


def has_fixed_statistics(layer: nn.Module | None) -> bool:
    """Whether this is torch's batch normalisation, by running statistics now."""
    # Another class may do anything in its forward, unless it says that in evaluation mode it is
    # torch's own.
    return (
        isinstance(layer, _BatchNorm)
        and (type(layer) in _NORMALISATIONS or getattr(layer, "is_torchs_in_evaluation", False))
        and not layer.training
        and layer.running_mean is not None
    )


def affine(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of a layer with running statistics, differentiable by its
    parameters."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    weight: Tensor | None = layer.weight
    bias: Tensor | None = layer.bias
    scale = torch.rsqrt(layer.running_var + layer.eps)
    scale = scale if weight is None else scale * weight
    if bias is None:
        return scale, -layer.running_mean * scale
    return scale, torch.addcmul(bias, layer.running_mean, scale, value=-1)


def graph_is_recomputed() -> bool:
    """Whether the graph is another's business: of checkpointing, which builds it twice and
    compares, or torch.func."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch >= 2.6
    return (
        hooks is None
        or hooks(True) is not None
        or torch._C._functorch.maybe_current_level() is not None
    )


def _pair(
    convolution: nn.Module | None, norm: nn.Module | None
) -> tuple[_ConvNd, _BatchNorm] | None:
    if type(convolution) not in _CONVOLUTIONS or not has_fixed_statistics(norm):
        return None
    assert isinstance(convolution, _ConvNd)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    # With a hook, somebody looks at what is between the two.
    if (
        _is_changed(convolution)
        or _is_changed(norm)
        or convolution.weight.dtype != norm.running_mean.dtype
    ):
        return None
    return convolution, norm


def _is_changed(layer: nn.Module) -> bool:
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return any(hooks) or "forward" in layer.__dict__


def _folded(convolution: _ConvNd, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    scale, shift = affine(norm)
    weight = convolution.weight * scale.view(-1, *(1 for _ in convolution.weight.shape[1:]))
    return weight, shift if convolution.bias is None else torch.addcmul(
        shift, convolution.bias, scale
    )
