"""Which parameters an operator acts on, and which pairs of a data set it averages over."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hessianflow.batches import as_batches
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

Selection = str | Sequence[str] | Sequence[Tensor] | None
"""All trainable parameters (None), name patterns ("layer1", ["head", "*.bias"]), or the tensors themselves."""


def select_parameters(model: nn.Module, params: Selection) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Names and tensors of the chosen trainable parameters, each tensor once however often it is tied.

    A pattern matches a parameter's name or that of a module that holds it. Frozen parameters are constants.

    Raises:
        HessianFlowError: nothing trainable is left.
    """
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and _wanted(name, parameter, params):
            chosen.setdefault(id(parameter), (name, parameter))
    if not chosen:
        raise HessianFlowError(_nothing_chosen(model, params))
    names, tensors = zip(*chosen.values(), strict=True)
    if any(tensor.is_complex() for tensor in tensors):
        raise HessianFlowError("parameters must be real, got a complex one; hold it as view_as_real")
    return names, tensors


def _wanted(name: str, parameter: Tensor, params: Selection) -> bool:
    if params is None:
        return True
    entries = [params] if isinstance(params, str) else params
    return any(
        fnmatchcase(name, entry) or fnmatchcase(name, f"{entry}.*") if isinstance(entry, str) else parameter is entry
        for entry in entries
    )


def _nothing_chosen(model: nn.Module, params: Selection) -> str:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        return f"{type(model).__name__} has no trainable parameter; set requires_grad_(True) on some"
    shown = repr(params) if isinstance(params, str) else "the selection"
    return f"params: no trainable parameter matches {shown}; names are like {', '.join(names[:3])}"


def batches_of(data: Any) -> Iterable[Any]:
    """The data as a re-iterable of batches; :func:`hessianflow.batches.as_batches` says what one batch is.

    Raises:
        HessianFlowError: an iterator that can be read only once, something that cannot be iterated,
            or single examples.
    """
    batches = as_batches(data)
    if isinstance(data, Iterator):
        raise HessianFlowError(
            f"data must be one pair or a re-iterable of pairs, got {article(data)} that ends after one pass; "
            "pass a list or a DataLoader"
        )
    if not isinstance(batches, Iterable):
        raise HessianFlowError(f"data must be a pair (inputs, targets) or a re-iterable of pairs, got {article(data)}")
    return batches


def single_batch(batches: Iterable[Any]) -> Any | None:
    """The one batch the data consists of, if it can be told without reading a data set."""
    return next(checked_batches(batches)) if isinstance(batches, list) and len(batches) == 1 else None


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one by one; each must be a pair or a mapping.

    Raises:
        HessianFlowError: something else, or nothing at all.
    """
    empty = True
    for batch in batches:
        if not isinstance(batch, Mapping) and not (isinstance(batch, (list, tuple)) and len(batch) == 2):
            size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
            raise HessianFlowError(
                f"each batch must be a pair (inputs, targets) or a dict, got {article(batch)}{size}; "
                "more than one input or target goes into a dict"
            )
        empty = False
        yield batch
    if empty:
        raise HessianFlowError("data is empty: it must hold at least one batch")
