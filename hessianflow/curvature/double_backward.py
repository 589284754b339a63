"""Convolution and batch normalisation with cheap second derivatives.

A product with the Hessian runs backwards through the graph of the gradient. There torch computes
two of a convolution's six convolutions by transposing activations into kernels as large as an
image, and it takes normalisation with running statistics apart into a dozen passes over the
activations. Here each operation is a pair of autograd functions:

    convolution, with G the gradient of its output and a, b the incoming second-order gradients of
    its gradients by x, w
        by G: a * w + x * b
        by x: the gradient by x for the kernel b
        by w: the gradient by w for the input a
    normalisation, y = c w (x - m) + s with c = 1 / sqrt(var + eps), and a, b, d those of its
    gradients by x, w, s
        by G: c w a + c b (x - m) + d      by x: c b G     by w: c sum(a G)

Each line is computed by torch's own forward and backward kernels, so values are those of torch up
to rounding. Images in float32 on a CPU are laid out with their channels last, whatever the layout
of the weights; the kernels keep that layout. Measured on one core, a product with ResNet-20 costs
1.6 gradients instead of 2.7, and with SqueezeNext 1.9 instead of 2.9; normalisation/folded.py
saves another 11 to 18 %.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from hessianflow.normalisation.folded import graph_is_recomputed

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_normalisation_backward = torch.ops.aten.native_batch_norm_backward.default

Sizes = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups of a convolution."""


class CheapDoubleBackward(TorchFunctionMode):
    """A mode in which convolution and batch normalisation build the graph described above.

    Weight normalisation is replaced, too, because torch's kernel for it (2.13, on a CPU) has a
    wrong second derivative, and the hard sigmoid, because its kernel has none. Calls that do not
    fit (batch statistics, padding given as a word, subclasses of tensors, calls in a checkpoint or
    under a torch.func transform) run as torch runs them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and not graph_is_recomputed():
            output = replacement(*args, **kwargs)
            if output is not None:  # None stands for arguments that do not fit
                return output
        return func(*args, **kwargs)


def has_replacements(model: nn.Module) -> bool:
    """Return whether a model may call something that is replaced.

    Otherwise the mode would only slow down every call of torch. Weights of convolutions have three
    dimensions and more, running statistics are buffers, and weights are normalised in a
    parametrization or a hook. A hard sigmoid that is called as a function in a model without any of
    these is not seen; derivatives.py then says what to use instead.
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
    # Channels last is the fast layout of these kernels on a CPU, and they keep it from here on.
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
    # With batch statistics the output is no fixed linear map; torch differentiates that itself.
    if training or running_mean is None or running_var is None or weight is None or bias is None:
        return None
    if not _are_plain(input, weight, bias, running_mean, running_var):
        return None
    output: Tensor = _Normalisation.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[no-untyped-call]
    return output


def _weight_normalised(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return the weight g v / ||v|| by operations whose second derivatives are right."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return relu6(x + 3) / 6; torch's own kernel lacks the second derivative, which is zero."""
    output = functional.relu6(input + 3) / 6
    if inplace:
        return input.copy_(output)
    return output


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch._weight_norm: _weight_normalised,
    torch.conv1d: _convolved,
    torch.conv2d: _convolved,
    torch.conv3d: _convolved,
    functional.batch_norm: _normalised,
    functional.hardsigmoid: _hard_sigmoid,
    torch._C._nn.hardsigmoid: _hard_sigmoid,
    torch._C._nn.hardsigmoid_: partial(_hard_sigmoid, inplace=True),
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
        by_bias = None
        if needs[2]:
            by_bias = gradient.sum([0, *range(2, gradient.ndim)])
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
        # A missing gradient stays None, which saves the convolutions with zeros.
        ctx.set_materialize_grads(False)
        return _backward(gradient, x, weight, sizes, *needs)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, *_ = ctx.needs_input_grad
        sizes = ctx.sizes
        by_gradient = by_x = by_weight = None
        if a is not None:
            by_gradient = _forward(a, weight, sizes)
            if needs_weight:
                by_weight = _backward(gradient, a, weight, sizes, False, True)[1]
        if b is not None:
            from_weight = _forward(x, b, sizes)
            if by_gradient is None:
                by_gradient = from_weight
            else:  # not in place: autograd may differentiate this once more
                by_gradient = by_gradient + from_weight
            if needs_x:
                by_x = _backward(gradient, x, b, sizes, True, False)[0]
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
        zero = torch.zeros_like(mean)
        slope = b * torch.rsqrt(var + ctx.eps)
        channels = (1, -1, *(1 for _ in x.shape[2:]))
        # c w a + d - m slope in one kernel, as a normalisation with mean 0 and a shifted bias.
        by_gradient = _fixed(a, weight, d - slope * mean, zero, var, ctx.eps)
        by_gradient = torch.addcmul(by_gradient, x, slope.view(channels))
        # One kernel gives both: the backward of a normalisation of a with the weight b.
        by_x, by_weight, _ = _fixed_backward(gradient, a, b, zero, var, ctx.eps)
        return by_gradient, by_x, by_weight, None, None, None


def _forward(x: Tensor, weight: Tensor, sizes: Sizes, bias: Tensor | None = None) -> Tensor:
    stride, padding, dilation, groups = sizes
    zeros = [0] * len(stride)
    output: Tensor = _convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups)
    return output


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, sizes: Sizes, by_x: bool, by_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = sizes
    zeros = [0] * len(stride)
    mask = [by_x, by_weight, False]
    # Where the mask says False, torch returns None.
    gradients: list[Tensor | None] = _convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return gradients[0], gradients[1]


def _fixed(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    # Outside training the statistics are read but never moved, whatever the momentum.
    use_cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, use_cudnn)


def _fixed_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mask = [True, True, True]
    # The two None are the statistics of a batch, which are used in training only.
    gradients: tuple[Tensor, Tensor, Tensor] = _normalisation_backward(
        gradient, x, weight, mean, var, None, None, False, eps, mask
    )
    return gradients


def _are_plain(*tensors: Tensor | None) -> bool:
    """Return whether all are ordinary tensors of one real type, which the kernels here expect."""
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == dtype for t in present)
    return plain and dtype.is_floating_point


def _each(value: Any, dimensions: int) -> list[int]:
    """Return one number for each dimension, from a single number or a sequence."""
    if isinstance(value, int):
        return [value] * dimensions
    if len(value) == 1:
        return list(value) * dimensions
    return list(value)
