"""Convolution and batch normalisation whose second derivatives cost what their multiplications
cost.

A product with the Hessian runs backwards through the graph of the gradient. There torch computes
two of a convolution's six convolutions by transposing activations into kernels as large as an
image, and takes normalisation with running statistics apart into a dozen passes over the
activations. Here each is a pair of autograd functions:

    convolution, with G the gradient of its output and a, b the incoming second-order gradients of
    its gradients by x, w
        by G: a * w + x * b
        by x: the gradient by x for the kernel b
        by w: the gradient by w for the input a
    normalisation, y = c w (x - m) + s with c = 1 / sqrt(var + eps), and a, b, d those of its
    gradients by x, w, s
        by G: c w a + c b (x - m) + d      by x: c b G     by w: c sum(a G)

all of them torch's own forward and backward kernels. Images in float32 on a processor go with the
channels last, whatever the layout of the weights; from there on the kernels keep it. Measured on
one core, in gradients: a product with ResNet-20 1.6 instead of 2.7, with SqueezeNext 1.9 instead of
2.9; normalisation/folded.py takes off another 11 to 18 %. The values are those of torch up to
rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from hessianflow.normalisation.folded import is_watched

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_normalisation_backward = torch.ops.aten.native_batch_norm_backward.default

Sizes = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class CheapDoubleBackward(TorchFunctionMode):
    """While active, calls of convolution and batch normalisation build the graph described above.

    Weight normalisation does, too: torch's kernel for it (2.13, on a processor) has a wrong second
    derivative; and so does the hard sigmoid, whose kernel has none. Whatever does not fit (batch
    statistics, padding given as a word, subclasses of tensors, parts that are checkpointed or under
    a torch.func transform) runs as torch runs it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        made = None if replacement is None or is_watched() else replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if made is None else made


def has_replacements(model: nn.Module) -> bool:
    """Return whether there may be something to replace; if not, the mode would only slow down every
    call of torch.

    Weights of convolutions have three dimensions and more, running statistics are buffers, and
    weights are normalised in a parametrization or a hook. A hard sigmoid that is called as a
    function in a model without any of these is not seen, and refused by its name.
    """
    return any(
        module._buffers
        or module._forward_pre_hooks
        or isinstance(module, (ParametrizationList, nn.Hardsigmoid))
        or any(p is not None and p.ndim > 2 for p in module._parameters.values())
        for module in model.modules()
    )


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or input.ndim != weight.ndim or not _are_plain(input, weight, bias):
        return None
    if input.ndim == 4 and input.device.type == "cpu" and input.dtype == torch.float32:
        input = input.contiguous(memory_format=torch.channels_last)
    sizes = *(_each(value, input.ndim - 2) for value in (stride, padding, dilation)), groups
    output: Tensor = _Convolution.apply(input, weight, bias, sizes)  # type: ignore[no-untyped-call]
    return output


def _normalised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or weight is None or bias is None:
        return None
    if not _are_plain(input, weight, bias, running_mean, running_var):
        return None
    output: Tensor = _Normalisation.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[no-untyped-call]
    return output


def _weight_normalised(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return the weight g v / ||v||, in operations whose second derivatives are right: those of
    torch's own are not."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6, of which torch's own kernel has no second derivative (which is zero)."""
    made = functional.relu6(input + 3) / 6
    return input.copy_(made) if inplace else made


def _hard_sigmoid_(input: Tensor) -> Tensor:
    return _hard_sigmoid(input, inplace=True)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch._weight_norm: _weight_normalised,
    torch.conv1d: _convolved,
    torch.conv2d: _convolved,
    torch.conv3d: _convolved,
    functional.batch_norm: _normalised,
    functional.hardsigmoid: _hard_sigmoid,
    torch._C._nn.hardsigmoid: _hard_sigmoid,
    torch._C._nn.hardsigmoid_: _hard_sigmoid_,
}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _forward(x, weight, sizes, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        by_x, by_weight = _ConvolutionBackward.apply(gradient, x, weight, ctx.sizes, needs[:2])  # type: ignore[no-untyped-call]
        by_bias = gradient.sum([0, *range(2, gradient.ndim)]) if needs[2] else None
        return by_x, by_weight, by_bias, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        sizes: Sizes,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(gradient, x, weight)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return _backward(gradient, x, weight, sizes, *needs)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, x, weight = ctx.saved_tensors
        needs, sizes = ctx.needs_input_grad, ctx.sizes
        by_gradient = None if a is None else _forward(a, weight, sizes)
        if b is not None:
            from_weight = _forward(x, b, sizes)
            by_gradient = from_weight if by_gradient is None else by_gradient + from_weight
        by_x = (
            _backward(gradient, x, b, sizes, True, False)[0] if needs[1] and b is not None else None
        )
        by_weight = (
            _backward(gradient, a, weight, sizes, False, True)[1]
            if needs[2] and a is not None
            else None
        )
        return by_gradient, by_x, by_weight, None, None


class _Normalisation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return _fixed(x, weight, bias, mean, var, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grads = _NormalisationBackward.apply(gradient, x, weight, mean, var, ctx.eps)  # type: ignore[no-untyped-call]
        return *grads, None, None, None


class _NormalisationBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gradient, x, weight, mean, var)
        ctx.eps = eps
        return _fixed_backward(gradient, x, weight, mean, var, eps)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x, weight, mean, var = ctx.saved_tensors
        zero, slope = torch.zeros_like(mean), b * torch.rsqrt(var + ctx.eps)
        channels = (1, -1, *(1 for _ in x.shape[2:]))
        by_gradient = _fixed(a, weight, d - slope * mean, zero, var, ctx.eps)
        by_gradient = torch.addcmul(by_gradient, x, slope.view(channels))
        # One kernel for both: the normalisation of a, with the weight b.
        by_x, by_weight, _ = _fixed_backward(gradient, a, b, zero, var, ctx.eps)
        return by_gradient, by_x, by_weight, None, None, None


def _forward(x: Tensor, weight: Tensor, sizes: Sizes, bias: Tensor | None = None) -> Tensor:
    stride, padding, dilation, groups = sizes
    output: Tensor = _convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return output


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, sizes: Sizes, by_x: bool, by_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = sizes
    zeros, mask = [0] * len(stride), [by_x, by_weight, False]
    found = _convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return (found[0] if by_x else None), (found[1] if by_weight else None)


def _fixed(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(
        x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled
    )


def _fixed_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mask = [True, True, True]
    found: tuple[Tensor, Tensor, Tensor]
    found = _normalisation_backward(gradient, x, weight, mean, var, None, None, False, eps, mask)
    return found


def _are_plain(*tensors: Tensor | None) -> bool:
    """Return whether all are ordinary tensors of one real type: with others, only torch knows what
    to do."""
    given = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == given[0].dtype for t in given)
    return plain and given[0].is_floating_point()


def _each(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values
