"""Which parameters an operator acts on, and which pairs of a data set it averages over."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hessianflow.batches import as_batches
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

Selection = str | Iterable[str | Tensor] | Tensor | None
"""All trainable parameters (None), name patterns ("layer1", ["head", "*.bias"]), or the tensors
themselves."""


def listed(params: Selection) -> Sequence[str | Tensor] | None:
    """Return the selection as a list: a generator of parameters ends after one reading, and a
    tensor iterates over its rows.

    Raises:
        HessianFlowError: something that is neither a name pattern nor a tensor.
    """
    if params is None:
        return None
    entries = (
        list(params)
        if isinstance(params, Iterable) and not isinstance(params, (str, Tensor))
        else [params]
    )
    for entry in entries:
        if not isinstance(entry, (str, Tensor)):
            raise HessianFlowError(
                f"params must be name patterns or parameters, got a {type(entry).__name__}; "
                "pass names, or module.parameters()"
            )
    return entries


def select_parameters(
    model: nn.Module, params: Selection
) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return names and tensors of the chosen trainable parameters, each tensor once however often
    it is tied.

    A pattern matches a parameter's name or that of a module that holds it. Frozen parameters are
    constants.

    Raises:
        HessianFlowError: nothing trainable is left, an entry that matches no parameter at all, or
            parameters that do not go together.
    """
    chosen: dict[int, tuple[str, Tensor]] = {}
    named, entries = list(model.named_parameters(remove_duplicate=False)), listed(params)
    patterns = None if entries is None else [entry for entry in entries if isinstance(entry, str)]
    tensors = {id(entry) for entry in entries or () if isinstance(entry, Tensor)}
    for name, parameter in named:
        wanted = (
            patterns is None or id(parameter) in tensors or any(_matches(name, p) for p in patterns)
        )
        if parameter.requires_grad and wanted:
            chosen.setdefault(id(parameter), (name, parameter))
    missed = [entry for entry in entries or () if not _is_among(entry, named)]
    if missed or not chosen:
        raise HessianFlowError(_nothing_chosen(named, model, missed[0] if missed else params))
    names, found = zip(*chosen.values(), strict=True)
    if any(tensor.is_complex() for tensor in found):
        raise HessianFlowError(
            "parameters must be real, got a complex one; hold it as view_as_real"
        )
    devices = sorted({str(tensor.device) for tensor in found})
    if len(devices) > 1:
        raise HessianFlowError(
            f"the selected parameters are on {' and '.join(devices)}; select those of one device"
        )
    return names, found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _is_among(entry: str | Tensor, named: Sequence[tuple[str, Tensor]]) -> bool:
    # One of several patterns with a slip of the pen would be left out in silence.
    return any(
        _matches(name, entry) if isinstance(entry, str) else parameter is entry
        for name, parameter in named
    )


def _nothing_chosen(named: Sequence[tuple[str, Tensor]], model: nn.Module, params: Any) -> str:
    names = [name for name, parameter in named if parameter.requires_grad]
    if not names:
        return (
            f"{type(model).__name__} has no trainable parameter; set requires_grad_(True) on some"
        )
    shown = "the selection"
    if isinstance(params, str):
        shown = repr(params)
    elif isinstance(params, Tensor):
        shown = f"the tensor of shape {list(params.shape)}"
    return f"params: no trainable parameter matches {shown}; names are like {', '.join(names[:3])}"


def batches_of(data: Any) -> Iterable[Any]:
    """Return the data as a re-iterable of batches; :func:`hessianflow.batches.as_batches` says what
    one batch is.

    Raises:
        HessianFlowError: an iterator that can be read only once, something that cannot be iterated,
            or single examples.
    """
    batches = as_batches(data)
    if isinstance(data, Iterator):
        raise HessianFlowError(
            f"data must be one pair or a re-iterable of pairs, got {article(data)} that ends after"
            " one pass; pass a list or a DataLoader"
        )
    if not isinstance(batches, Iterable):
        raise HessianFlowError(
            f"data must be a pair (inputs, targets) or a re-iterable of pairs, got {article(data)}"
        )
    return batches


def single_batch(batches: Iterable[Any]) -> Any | None:
    """Return the one batch the data consists of, if it can be told without reading a data set."""
    return (
        next(checked_batches(batches)) if isinstance(batches, list) and len(batches) == 1 else None
    )


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches one by one; refuse one that is neither a pair nor a mapping.

    Raises:
        HessianFlowError: something else, or nothing at all.
    """
    empty = True
    for batch in batches:
        if not isinstance(batch, Mapping) and not (
            isinstance(batch, (list, tuple)) and len(batch) == 2
        ):
            size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
            raise HessianFlowError(
                "each batch must be a pair (inputs, targets) or a dict, got"
                f" {article(batch)}{size}; more than one input or target goes into a dict"
            )
        empty = False
        yield batch
    if empty:
        raise HessianFlowError("data is empty: it must hold at least one batch")
