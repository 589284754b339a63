"""Operations on whole lists of tensors with a few kernel launches and without a host
synchronisation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError

Factor = float | Tensor
"""One factor for all tensors (a number or a 0-dim tensor), or a vector with one factor a tensor."""

Tensors = tuple[Tensor, ...] | list[Tensor]


def buckets(
    params: Iterable[Tensor], optimizer: str
) -> dict[tuple[torch.device, torch.dtype, bool], list[Tensor]]:
    """Parameters that have a gradient, by device, dtype and whether they have more than one
    dimension.

    Raises:
        HessianFlowError: a gradient is sparse.
    """
    found: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for parameter in params:
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            raise HessianFlowError(
                f"{optimizer} needs dense gradients, got {parameter.grad.layout}: use sparse=False"
            )
        key = (parameter.device, parameter.dtype, parameter.ndim > 1)
        found.setdefault(key, []).append(parameter)
    return found


def state_tensors(state: dict[Tensor, dict[str, Any]], params: Tensors, name: str) -> list[Tensor]:
    """The state tensor `name` of every parameter, zeros where there is none yet.

    Raises:
        HessianFlowError: a parameter has changed its shape since its state was made.
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
    """The l2 norm of every tensor, shape [len(tensors)], in single precision for half-precision
    tensors."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32 if half else None))


def scaled(tensors: Tensors, factor: Factor) -> Tensors:
    """factor * tensor for every tensor; the very same tensors when the factor is the number 1."""
    if isinstance(factor, float) and factor == 1:
        return tensors
    if isinstance(factor, Tensor) and factor.ndim == 1:
        return torch._foreach_mul(tensors, spread(factor, tensors))
    return torch._foreach_mul(tensors, factor)


def scale_(tensors: Tensors, factor: float) -> None:
    """tensor *= factor for every tensor, in place."""
    torch._foreach_mul_(tensors, number(factor, tensors))


def number(value: float, tensors: Tensors) -> Factor:
    """`value` in the form that an operation of these tensors with one number for all takes fastest.

    On a processor a number would be wrapped into a tensor anew for every tensor of the list, which
    takes longer than the operation itself where tensors are small; one 0-dim tensor for all gives
    the same results.
    """
    if tensors[0].is_cuda:
        return value
    return torch.tensor(
        value, dtype=torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    )


def add_scaled_(targets: Tensors, tensors: Tensors, factor: Factor, sign: float = 1.0) -> None:
    """target += sign * factor * tensor for every pair, in place."""
    if not isinstance(factor, Tensor):
        torch._foreach_add_(targets, tensors, alpha=sign * factor)
    elif factor.ndim == 0:
        torch._foreach_add_(targets, torch._foreach_mul(tensors, factor), alpha=sign)
    elif factor.device.type == "cpu":
        # There the kernel takes one number for each tensor; a list of 0-dim tensors takes half as
        # long again to make.
        one = torch.ones((), dtype=tensors[0].dtype)
        torch._foreach_addcmul_(targets, tensors, [one] * len(tensors), sign * factor)
    else:
        torch._foreach_addcmul_(targets, tensors, spread(factor, tensors), value=sign)


def spread(factors: Tensor, tensors: Tensors) -> Tensors:
    """The factors as a list that operations on two lists take, one for each tensor."""
    factors = factors.to(tensors[0].dtype)
    if not tensors[0].is_cuda:
        return factors.unbind()
    # On a GPU a list that broadcasts would be one launch a tensor; the same factors written out are
    # one launch in all.
    return written_out(factors, tensors)


def written_out(factors: Tensor, tensors: Tensors) -> Tensors:
    """Factor i repeated in the shape and strides of tensor i, from a single concatenation."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat(
        [factor.expand(size) for factor, size in zip(factors.unbind(), sizes, strict=True)]
    )
    return [
        (
            part.as_strided(tensor.shape, tensor.stride())
            if _is_dense(tensor)
            else part.view(tensor.shape)
        )
        for part, tensor in zip(torch.split(flat, sizes), tensors, strict=True)
    ]


def _is_dense(tensor: Tensor) -> bool:
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return reach + 1 == tensor.numel()


def evaluate(closure: Callable[[], Any]) -> Any:
    """The loss of a closure, with gradients enabled.

    Raises:
        HessianFlowError: it returned None.
    """
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise HessianFlowError("closure must return the loss, got None: end it with `return loss`")
    return loss
