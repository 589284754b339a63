"""Graphs that have no second derivative or a wrong one, and advice for the errors that follow."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointError

from hessianflow.interfaces import HessianFlowError

_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


@contextmanager
def explained(num_examples: int) -> Iterator[None]:
    """Turn failures that users meet into a HessianFlowError of one line that says what to do.

    They are: no memory for `num_examples` in one pass, an operation without a second derivative,
    and a loss that differentiates by something that is a constant here.
    """
    try:
        yield
    except HessianFlowError:
        raise
    except (RuntimeError, MemoryError, ValueError) as error:
        advice = _advice(error, num_examples)
        if advice is None:
            raise
        raise HessianFlowError(advice) from error


_WRONG = "WeightNormInterfaceBackward"
"""Node whose second derivative torch (2.13, on a CPU) gets wrong; see double_backward.py."""

_REENTRANT = (
    "a part of the model is checkpointed with use_reentrant=True, and autograd.grad does not reach"
    " the weights inside; pass use_reentrant=False to the checkpoint"
)


UNREACHED = (
    "the loss does not depend on the selected parameters; is it detached, or does a wrapper compute"
    " with other tensors than the parameters it shows?"
)


class Graph(NamedTuple):
    """Facts read from the nodes of a graph."""

    foreign: tuple[str, ...] = ()  # functions neither torch's nor ours: their backward may be wrong
    rounds: bool = False  # whether values are rounded to 16 bits on the way
    recomputes: bool = False  # whether products run code of the model, as in a checkpointed block


def inspect_graph(loss: Tensor) -> Graph:
    """Read the facts of the graph behind a loss; raise HessianFlowError if products would be wrong.

    A function with a once_differentiable backward is refused, because autograd leaves its curvature
    out without an error where the incoming gradient is constant. So are a function that torch gets
    wrong and reentrant checkpointing, where the weights inside get no gradient.
    """
    # Dictionaries in place of sets: the order of the graph is kept, and so are messages.
    functions: dict[type[Any], None] = {}
    names: dict[str, None] = {}
    rounds = recomputes = False
    for node in _nodes(loss):
        function = getattr(node, "_forward_cls", None)
        if function is not None:
            functions[function] = None
        name = node.name()
        names[name] = None
        if name == "ToCopyBackward0":  # a cast, such as autocast makes
            rounds = rounds or node._input_metadata[0].dtype in (torch.float16, torch.bfloat16)
        recomputes = recomputes or _has_hooks(node)
    if any(f.__name__ == "CheckpointFunction" for f in functions):
        raise HessianFlowError(_REENTRANT)
    once = sorted(f.__name__ for f in functions if _is_once_differentiable(f.backward))
    if once:
        raise HessianFlowError(
            f"the loss has no second derivative: {', '.join(once)} is once_differentiable; make its"
            " backward differentiable"
        )
    if any(name.startswith(_WRONG) for name in names):
        raise HessianFlowError(
            "torch._weight_norm has a wrong second derivative on a CPU; use"
            " torch.nn.utils.parametrizations.weight_norm, which is replaced here, or write out"
            " g * v / v.norm()"
        )
    foreign = [f.__name__ for f in functions if not f.__module__.startswith("hessianflow.")]
    return Graph((*foreign, *(name for name in names if "CppNode" in name)), rounds, recomputes)


def _has_hooks(node: Any) -> bool:
    """Return whether hooks process a saved value of a node when it is read."""
    for name in _saved_names(type(node)):  # type: ignore[arg-type]
        saved = getattr(node, name)
        if not isinstance(saved, (tuple, list)):
            saved = (saved,)
        if any(one is not None and one.unpack_hook is not None for one in saved):
            return True
    return False


@cache
def _saved_names(kind: type[Any]) -> tuple[str, ...]:
    """Return the attributes under which a kind of node shows its saved values."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def check_reached(gradients: Iterable[Tensor | None]) -> None:
    """Raise HessianFlowError if all gradients are None: the loss uses none of the parameters."""
    if all(gradient is None for gradient in gradients):
        raise HessianFlowError(UNREACHED)


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Yield all nodes of the graph of a loss."""
    pending = [loss.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [parent for parent, _ in node.next_functions]


_ONCE = once_differentiable(lambda _: None).__code__


def _is_once_differentiable(backward: Any) -> bool:
    """Return whether torch's decorator once_differentiable is among those of a backward.

    It is told by its code, because other decorators set `__wrapped__`, too.
    """
    while backward is not None:
        if getattr(backward, "__code__", None) is _ONCE:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


def _advice(error: RuntimeError | MemoryError | ValueError, num_examples: int) -> str | None:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory with {num_examples} examples in one pass; try"
            f" microbatch_size={max(1, num_examples // 2)}"
        )
    missing = _MISSING.search(text)
    if missing:
        way_out = _USE.get(missing.group(1), "replace that operation")
        return f"the loss has no second derivative: '{missing.group(1)}' has none; {way_out}"
    if isinstance(error, CheckpointError):
        return (
            "a checkpointed part of the model returns other tensors when it runs again; leave the"
            " checkpoint out"
        )
    return next((advice for sign, advice in _ADVICE.items() if sign in text), None)


_USE = {"hardsigmoid_backward": "use nn.Hardsigmoid, which is replaced here, or relu6(x + 3) / 6"}
_CONSTANT = (
    "the loss differentiates by something that is a constant here, such as weights that are not"
    " selected; leave params=None, or call requires_grad_() in the loss"
)
_ADVICE = {
    "to match target batch_size": (
        "outputs and targets have different numbers of examples; pass equal numbers of both"
    ),
    "does not currently support double backward": (
        "the loss has no second derivative: a part of the model is compiled; pass it uncompiled"
    ),
    "with @once_differentiable": (
        "the loss has no second derivative: a function of it is once_differentiable; make its"
        " backward differentiable"
    ),
    "When use_reentrant=True": _REENTRANT,
    "Checkpointing is not compatible with .grad()": _REENTRANT,
    "element 0 of tensors does not require grad": _CONSTANT,
    "One of the differentiated Tensors does not require grad": _CONSTANT,
    "Expected more than 1 value per channel": (
        "a layer normalises by the statistics of the batch, and one example has none; pass more"
        " than one"
    ),
}
"""Advice, by a phrase of torch's message."""
