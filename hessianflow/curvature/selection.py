"""The parameters that an operator acts on, and the batches that it averages over."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hessianflow.batches import as_batches, is_pair
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article, described, entries, is_list

Selection = str | Iterable[str | Tensor] | Tensor | None
"""All trainable parameters (None), name patterns ("layer1", ["head", "*.bias"]), or the tensors
themselves."""


def listed(params: Selection) -> Sequence[str | Tensor] | None:
    """Return the selection as a list; raise HessianFlowError unless it holds names or tensors."""
    if params is None:
        return None
    entries: list[Any] = [params]
    # Text and tensors, which iterate over their letters and rows, are single entries.
    if isinstance(params, Iterable) and not isinstance(params, (str, Tensor)):
        entries = list(params)
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
    """Return names and tensors of the selected trainable parameters, each tied tensor once.

    A pattern matches a parameter's name or that of a module that holds it. Frozen parameters are
    constants. Raise HessianFlowError if none is selected, if an entry matches none, or if they are
    complex or on several devices.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    entries = listed(params)
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad and _is_selected(name, parameter, entries):
            chosen.setdefault(id(parameter), (name, parameter))
    # Without this check, one of several patterns with a slip of the pen would be left out silently.
    for entry in entries or ():
        if not any(_is_selected(name, parameter, [entry]) for name, parameter in named):
            raise HessianFlowError(_nothing_chosen(named, model, entry))
    if not chosen:
        raise HessianFlowError(_nothing_chosen(named, model, params))
    names, tensors = zip(*chosen.values(), strict=True)
    if any(tensor.is_complex() for tensor in tensors):
        raise HessianFlowError("parameters must be real, got a complex one; use view_as_real")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise HessianFlowError(
            f"the selected parameters are on {' and '.join(devices)}; select those of one device"
        )
    return names, tensors


def _is_selected(name: str, parameter: Tensor, entries: Sequence[str | Tensor] | None) -> bool:
    if entries is None:
        return True
    return any(parameter is one or (isinstance(one, str) and matches(name, one)) for one in entries)


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name, or that of a module that holds what is named."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _nothing_chosen(named: Sequence[tuple[str, Tensor]], model: nn.Module, params: Any) -> str:
    names = [name for name, parameter in named if parameter.requires_grad]
    if not names:
        kind = type(model).__name__
        return f"{kind} has no trainable parameter; set requires_grad_(True) on some"
    shown = "the selection"
    if isinstance(params, str):
        shown = repr(params)
    elif isinstance(params, Tensor):
        shown = f"the tensor of shape {list(params.shape)}"
    return f"params: no trainable parameter matches {shown}; names are like {', '.join(names[:3])}"


def batches_of(data: Any) -> Iterable[Any]:
    """Return the data as a re-iterable of batches, told from a batch as by `as_batches`.

    Raise HessianFlowError for an iterator, which can be read only once, what cannot be iterated,
    and single examples.
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
    """Return the only batch, or None if there are several or only reading the data would tell."""
    if isinstance(batches, list) and len(batches) == 1:
        return next(checked_batches(batches))
    return None


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, each of which must be a pair, a mapping, a dataclass or a named tuple.

    Raises:
        HessianFlowError: there is no batch, or a batch is neither a pair nor has names.
    """
    empty = True
    for batch in batches:
        has_names = entries(batch) is not None and not is_list(batch)
        if not has_names and not is_pair(batch):
            raise HessianFlowError(
                "each batch must be a pair (inputs, targets) or a dict, got"
                f" {described(batch)}; more than one input or target goes into a dict"
            )
        empty = False
        yield batch
    if empty:
        raise HessianFlowError("data is empty: it must hold at least one batch")
