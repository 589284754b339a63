"""The conditions under which second derivatives exist and are exact, and plain words for when they do not.

Fused kernels (attention, recurrent nets) and compiled graphs have no second derivative, and autocast rounds products to
16 bits. `second_order` turns all of them off for the duration; nothing outlives it.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessianflow.interfaces import HessianFlowError

_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
_COMPILED = "does not currently support double backward"


@contextmanager
def second_order(model: nn.Module) -> Iterator[None]:
    """Run the model with kernels that can be differentiated twice, in its own precision."""
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # Fused recurrent kernels have no second derivative. Only here: without cuDNN convolutions are slow.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            # Parts of the model may be compiled (only then is dynamo loaded): run them uncompiled (torch >= 2.6).
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Suspend autocast (a product inside the user's autocast block would be rounded) and inference mode."""
    if not (torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        yield  # nothing to suspend: entering the contexts all the same would cost a small net a tenth of each product
        return
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextmanager
def explained(num_examples: int) -> Iterator[None]:
    """Turn the two failures that users meet into one line that says what to do.

    Args:
        num_examples: examples in the forward pass, for the advice on memory.

    Raises:
        HessianFlowError: out of memory, or an operation without a second derivative.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        advice = _advice(error, num_examples)
        if advice is None:
            raise
        raise HessianFlowError(advice) from error


_WRONG = "WeightNormInterfaceBackward"
"""Node whose second derivative torch (2.13, on a processor) gets wrong; see double_backward.py."""


def check_twice_differentiable(loss: Tensor) -> None:
    """Refuse a loss whose graph holds a function with a once_differentiable backward, or a wrong one of torch.

    Where the incoming gradient of the first kind is constant, autograd would silently leave its curvature out instead
    of raising.

    Raises:
        HessianFlowError: with the names of such functions.
    """
    once, wrong = _without_second_derivative(loss)
    if once:
        raise HessianFlowError(
            f"the loss has no second derivative: {', '.join(once)} is once_differentiable; make its backward "
            "differentiable"
        )
    if wrong:
        raise HessianFlowError(
            "torch._weight_norm has a wrong second derivative on a processor; use "
            "torch.nn.utils.parametrizations.weight_norm, which is replaced here, or write g * v / v.norm() out"
        )


def _advice(error: RuntimeError | MemoryError, num_examples: int) -> str | None:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory with {num_examples} examples in one pass; try microbatch_size={max(1, num_examples // 2)}"
        )
    missing = _MISSING.search(text)
    if missing:
        return f"the loss has no second derivative: '{missing.group(1)}' has none; replace that operation"
    if _COMPILED in text:
        return "the loss has no second derivative: a part of the model is compiled; pass it uncompiled"
    return None


def _without_second_derivative(loss: Tensor) -> tuple[list[str], bool]:
    """Names of the custom functions in the graph whose backward may be run once only; whether a wrong one is there."""
    pending, seen, names, wrong = [loss.grad_fn], set(), set(), False
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and hasattr(function.backward, "__wrapped__"):
            names.add(function.__name__)
        wrong |= node.name().startswith(_WRONG)
        pending += [parent for parent, _ in node.next_functions]
    return sorted(names), wrong
