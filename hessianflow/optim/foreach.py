"""Operations on lists of tensors, with few kernel launches and without a host synchronisation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError

Factor = float | Tensor
"""A single factor (a number or a 0-dim tensor), or a vector with one factor per tensor."""

Tensors = tuple[Tensor, ...] | list[Tensor]


def buckets(
    params: Iterable[Tensor], optimizer: str
) -> dict[tuple[torch.device, torch.dtype, bool], list[Tensor]]:
    """Return the parameters with a gradient by device, dtype and whether their ndim is above 1.

    Raises:
        HessianFlowError: A gradient is sparse.
    """
    lists: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for parameter in params:
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            raise HessianFlowError(
                f"{optimizer} needs dense gradients, got {parameter.grad.layout}: use sparse=False"
            )
        key = (parameter.device, parameter.dtype, parameter.ndim > 1)
        lists.setdefault(key, []).append(parameter)
    return lists


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [parameter.grad for parameter in params if parameter.grad is not None]


def state_tensors(state: dict[Tensor, dict[str, Any]], params: Tensors, name: str) -> list[Tensor]:
    """Return the state tensor `name` of every parameter, and make zeros where there is none yet.

    Raises:
        HessianFlowError: A parameter has changed its shape since its state was made.
    """
    tensors = []
    for parameter in params:
        own = state[parameter]
        if name not in own:
            own[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if own[name].shape != parameter.shape:
            raise HessianFlowError(
                f"parameters must keep their shape, but {[*own[name].shape]} became"
                f" {[*parameter.shape]}: make a new optimizer for the changed model"
            )
        tensors.append(own[name])
    return tensors


def norms(tensors: Tensors) -> Tensor:
    """Return the l2 norm of every tensor, shape [len(tensors)]; half precision becomes single."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else None
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def scaled(tensors: Tensors, factor: Factor) -> Tensors:
    """Return factor * tensor for every tensor, and the tensors themselves for the number 1."""
    if isinstance(factor, float) and factor == 1:
        return tensors
    if isinstance(factor, Tensor) and factor.ndim == 1:
        return torch._foreach_mul(tensors, spread(factor, tensors))
    return torch._foreach_mul(tensors, factor)


def scale_(tensors: Tensors, factor: float) -> None:
    """Multiply every tensor by a factor, in place."""
    torch._foreach_mul_(tensors, number(factor, tensors))


def number(value: float, tensors: Tensors) -> Factor:
    """Return `value` in the form in which a foreach operation on these tensors takes it fastest.

    On a CPU torch would wrap a number into a tensor again for every tensor of the list, which takes
    longer than the operation itself if tensors are small; one 0-dim tensor gives the same results.
    """
    if tensors[0].is_cuda:
        return value
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype)


def add_scaled_(targets: Tensors, tensors: Tensors, factor: Factor, sign: float = 1.0) -> None:
    """Add sign * factor * tensor to the target of every pair, in place."""
    if not isinstance(factor, Tensor):
        torch._foreach_add_(targets, tensors, alpha=sign * factor)
    elif factor.ndim == 0:
        torch._foreach_add_(targets, torch._foreach_mul(tensors, factor), alpha=sign)
    elif factor.device.type == "cpu":
        # On a CPU the kernel takes one number per tensor. A list of 0-dim tensors would take half
        # as long again to make.
        one = torch.ones((), dtype=tensors[0].dtype)
        torch._foreach_addcmul_(targets, tensors, [one] * len(tensors), sign * factor)
    else:
        torch._foreach_addcmul_(targets, tensors, spread(factor, tensors), value=sign)


def spread(factors: Tensor, tensors: Tensors) -> Tensors:
    """Return the factors as a list with one factor per tensor, for operations on two lists."""
    factors = factors.to(tensors[0].dtype)
    if not tensors[0].is_cuda:
        return factors.unbind()
    # On a GPU a list that broadcasts would need one launch per tensor; written out, the same
    # factors need one launch in all.
    return written_out(factors, tensors)


def written_out(factors: Tensor, tensors: Tensors) -> Tensors:
    """Return factor i repeated in the shape and strides of tensor i, from one concatenation."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat(
        [factor.expand(size) for factor, size in zip(factors.unbind(), sizes, strict=True)]
    )
    return [_laid_out(*pair) for pair in zip(torch.split(flat, sizes), tensors, strict=True)]


def _laid_out(numbers: Tensor, tensor: Tensor) -> Tensor:
    if _is_dense(tensor):
        return numbers.as_strided(tensor.shape, tensor.stride())
    return numbers.view(tensor.shape)


def _is_dense(tensor: Tensor) -> bool:
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return reach + 1 == tensor.numel()


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return the loss that a closure computes with gradients enabled; None without a closure.

    Raises:
        HessianFlowError: The closure returned None.
    """
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise HessianFlowError("closure must return the loss, got None: end it with `return loss`")
    return loss
