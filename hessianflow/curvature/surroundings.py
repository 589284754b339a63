"""The conditions under which a model is differentiated twice.

Fused kernels (attention, recurrent nets) and compiled graphs have no second derivative, and
autocast rounds products to 16 bits. The fast path of torch's transformer layers, taken where no
gradient is asked for, writes zeros at padded positions, so it computes another function. Backward
hooks belong to the training step (clipping, rates of layers) and would change the matrix.
`second_order` turns all of them off while it is active and restores them afterwards.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessianflow.curvature.double_backward import CheapDoubleBackward, has_replacements
from hessianflow.interfaces import NormMode
from hessianflow.measuring import measuring
from hessianflow.normalisation.folded import folded_normalisation


@contextmanager
def differentiating(
    model: nn.Module, norm_mode: NormMode, parameters: Iterable[Tensor]
) -> Iterator[nn.Module]:
    """Yield a model to measure, with cheap second-order kernels, other parameters held constant."""
    selected = {id(p) for p in parameters}
    with measuring(model, norm_mode) as inner:
        for parameter in inner.parameters():
            if id(parameter) not in selected:
                parameter.requires_grad_(False)
        cheap: Any = nullcontext()
        if has_replacements(inner):
            cheap = CheapDoubleBackward()
        with second_order(inner), folded_normalisation(inner) as folded, cheap:
            yield folded


@contextmanager
def second_order(model: nn.Module) -> Iterator[None]:
    """Run the model with kernels that can be differentiated twice, in its own precision."""
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(without_hooks(_hooks_of(modules)))
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # Fused recurrent kernels have no second derivative. Other models keep cuDNN, without
            # which convolutions are slow.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            # Modules inside the model may be compiled (only then is dynamo loaded): run them
            # uncompiled, which torch can do from 2.6 on.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Suspend autocast, which would round products, and inference mode, which forbids graphs."""
    is_rounded = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if not (is_rounded or torch.is_inference_mode_enabled()):
        # Entering the contexts without need would cost a small net a tenth of each product.
        yield
        return
    autocast = partial(torch.autocast, enabled=False)
    with torch.inference_mode(False), autocast("cpu"), autocast("cuda"):
        yield


Hooks = dict[int, Callable[..., Any]]


@contextmanager
def without_hooks(held: Iterable[Hooks | None]) -> Iterator[None]:
    """Empty some tables of hooks of tensors or modules (or None), and put the hooks back in order.

    The tables stay the same objects, so handles still remove their hooks.
    """
    emptied = [(table, dict(table)) for table in held if table]
    for table, _ in emptied:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in emptied:
            added = dict(table)
            table.clear()
            table.update(hooks | added)


def _hooks_of(modules: Iterable[nn.Module]) -> list[Hooks | None]:
    """Return the tables of backward hooks of some modules and of their parameters."""
    kinds = ("_backward_hooks", "_backward_pre_hooks")
    tables: list[Hooks | None] = [module.__dict__.get(kind) for module in modules for kind in kinds]
    parameters = (p for module in modules for p in module._parameters.values() if p is not None)
    return tables + [parameter._backward_hooks for parameter in parameters]
