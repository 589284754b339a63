"""Move, count and cut batches, for the whole package. Sizes are in examples.

A batch is a pair (inputs, targets) or one mapping. Its parts are tensors, and mappings (a
`UserDict` or the output of a tokenizer like a dict), dataclasses, named tuples, lists and tuples of
parts. What happens when it is cut:

- A tensor or an array whose first dimension is the number of examples is cut, and so is a list or
  tuple with one entry an example. A mapping, dataclass or named tuple, and a list or tuple of
  tensors, is cut part by part.
- A tensor without a dimension or with a first dimension of 1 belongs to all examples, and so do
  text, numbers and None: they are kept whole.
- Anything else might be either, and is refused by name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hessianflow.interfaces import Batch, HessianFlowError, Rewindable
from hessianflow.structure import article, entries, entry_names, is_list, is_plain, mapped, rebuilt

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
"""Where a mapping holds its targets, which then say how many examples it has. Ours."""


def num_examples(batch: Any) -> int:
    """Return the number of examples of a batch, or of its targets: the first dimension of their
    tensors.

    In a pair the targets decide, in a mapping the first entry that has one of :data:`TARGET_NAMES`;
    the inputs where these hold no tensor.

    Raises:
        HessianFlowError: no tensor with a dimension in it, or several first dimensions and nothing
            that decides.
    """
    if is_list(batch) and not batch:
        return 0
    decisive = batch[1] if is_list(batch) and len(batch) == 2 else batch
    if isinstance(decisive, Tensor) and decisive.ndim > 0:
        return int(decisive.shape[0])
    found = _counts(batch)
    if is_list(batch) and len(batch) == 2:
        inputs, targets = (_counts(part) for part in batch)
        found = targets or inputs or found
        found = found if len(found) == 1 else found & inputs or found
    if len(found) == 1:
        return found.pop()
    if found:
        raise HessianFlowError(
            f"cannot tell the number of examples of {article(batch)} whose entries have"
            f" {_listed(found)} rows: pass a pair (inputs, targets), or call the entry with one row"
            " an example 'labels'"
        )
    raise HessianFlowError(
        "a batch must hold at least one tensor with a row an example, found none in"
        f" {article(batch)}: pass batches, such as next(iter(loader)), and not a loader or a single"
        " example"
    )


def move(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """Return the same structure with all tensors on `device`, and other objects that have a method
    `to`."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return mapped(moved, batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return the same structure with `function` applied to every tensor."""

    def applied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return leaf

    return mapped(applied, batch)


def tensors_in(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch, or of one of its parts, in order."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return tensors


def split(batch: Batch, size: int | None, group: int | None = None) -> Iterator[Batch]:
    """Cut a batch, in order, into the fewest microbatches of at most `size` examples. None: one
    piece.

    The pieces are as equal as can be (130 examples at size 128 make 65 + 65): batch normalisation
    then never sees a microbatch of a few examples next to full ones. Of an odd number in twos, one
    piece has three (:func:`num_parts`).

    Args:
        batch: (inputs, targets), or one mapping.
        size: most examples a piece.
        group: the batch is thought of as the fewest equal groups of at most this many, and a piece
            that can hold one holds whole groups only: what is normalised together does not depend
            on `size`.

    Raises:
        HessianFlowError: as :func:`take_rows`.
    """
    total = num_examples(batch)
    if size is None or size >= total:
        yield batch
        return
    unit = group if group is not None and group <= size else size
    units = num_parts(total, unit)
    for first in range(0, units, size // unit):
        last = min(first + size // unit, units)
        yield take_rows(batch, slice(_edge(total, units, first), _edge(total, units, last)), total)


def take_rows(part: Any, rows: slice | Tensor, total: int, name: str = "") -> Any:
    """Return some examples of a batch or of one of its parts; what belongs to all examples stays
    whole.

    Args:
        part: a pair, a mapping, or, with a name, a part of them.
        rows: which: a slice, or indices int64 [n].
        total: examples that `part` has.
        name: of the part, for errors; those of a pair are "inputs" and "targets".

    Raises:
        HessianFlowError: an entry of another length than `total`, or a list that can be read in two
            ways.
    """
    if isinstance(part, Tensor) and part.ndim > 0 and part.shape[0] == total:
        return part[rows]
    if isinstance(part, (Tensor, np.ndarray)):
        return _cut(part, rows) if _has_rows(part, total, name) else part
    if is_plain(part):
        return part
    values = entries(part)
    if values is None:
        raise HessianFlowError(
            f"{name or 'batch'} is {article(part)}, whose rows are not known: it cannot be cut into"
            " parts; use tensors in dicts, or leave the batch in one piece"
        )
    is_pair = not name and is_list(part) and len(part) == 2
    if not is_pair and is_list(part) and _is_one_an_example(part, total, name):
        return type(part)(values[number] for number in _numbers(rows, total))
    names = (
        ["inputs", "targets"]
        if is_pair
        else [(name or "batch") + entry for entry in entry_names(part)]
    )
    return rebuilt(part, [take_rows(v, rows, total, n) for v, n in zip(values, names, strict=True)])


def _cut(part: Tensor | np.ndarray[Any, Any], rows: slice | Tensor) -> Any:
    if isinstance(part, np.ndarray) and isinstance(rows, Tensor):
        return part[rows.cpu().numpy()]
    return part[rows]


def _has_rows(part: Tensor | np.ndarray[Any, Any], total: int, name: str) -> bool:
    """Return whether each example has a row of its own; False where the whole belongs to all.

    Raises:
        HessianFlowError: another number of rows.
    """
    reading = _reading(part, total)
    if reading == "unknown":
        raise HessianFlowError(
            f"{name or 'batch'} has {part.shape[0]} rows in a batch of {total} examples and cannot"
            " be cut with them: if all examples share it, give it a first dimension of 1"
            " (t[None]); if they have several rows each, pad these to one"
        )
    return reading == "rows"


def _is_one_an_example(part: Sequence[Any], total: int, name: str) -> bool:
    """Return whether each entry of a list belongs to one example, and not to all of them.

    Raises:
        HessianFlowError: it can be either.
    """
    if len(part) != total:
        return False
    readings = {_reading(entry, total) for entry in part}
    can_be_cut = "rows" in readings and "unknown" not in readings
    if can_be_cut and total > 1:
        raise HessianFlowError(
            f"{name or 'batch'} is a {type(part).__name__} of {total} entries of {total} rows in a"
            f" batch of {total} examples: is it one entry an example, or one row? Use a dict, or"
            " leave this batch in one piece"
        )
    return not can_be_cut


def _reading(part: Any, total: int) -> Literal["rows", "shared", "unknown"]:
    """Return what a cut of this part alone would do: take its rows, leave it whole, or be
    refused."""
    if isinstance(part, (Tensor, np.ndarray)):
        rows = int(part.shape[0]) if part.ndim else 1
        return "rows" if part.ndim and rows == total else "shared" if rows == 1 else "unknown"
    if is_plain(part):
        return "shared"
    if is_list(part) and len(part) == total:
        return "rows"
    values = entries(part)
    readings = {"unknown"} if values is None else {_reading(value, total) for value in values}
    return "unknown" if "unknown" in readings else "rows" if "rows" in readings else "shared"


def _numbers(rows: slice | Tensor, total: int) -> Iterable[int]:
    # Waits for the device only where lists are kept beside tensors: their entries are on the host.
    return range(*rows.indices(total)) if isinstance(rows, slice) else rows.tolist()


def num_parts(total: int, size: int) -> int:
    """Return the fewest parts of at most `size` examples that leave none alone.

    Batch normalisation cannot train on one example. Equal parts hold fewer than two only where an
    odd number is cut in twos; one part then has three. Parts of one are what was asked for.
    """
    parts = -(-total // size)
    return max(min(parts, total // 2), 1) if size > 1 else parts


def _edge(total: int, parts: int, index: int) -> int:
    """Return where part `index` begins when `total` is cut as `torch.tensor_split` does: the first
    ones are longer by one."""
    return index * (total // parts) + min(index, total % parts)


def as_batches(data: Any) -> Iterable[Any]:
    """Return one pair, or one mapping, as a list of one batch, and an iterable of batches as it is.

    A tuple or list of two is a pair unless its second member is a tuple or list and its first no
    tensor, or both are mappings: ((x1, x2), y) and (x, (y1, y2)) are pairs, [(x, y), (x, y)] and
    [{...}, {...}] are two batches. Data with a method `rewind()`, such as the streams of `hf.data`,
    are put to the first of their batches: a part of an epoch would pass for the whole.

    Raises:
        HessianFlowError: a tensor, tensors that are no pair, or a data set whose items are single
            examples.
    """
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        return [data]
    if (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and not isinstance(data[1], (tuple, list))
    ):
        return data if isinstance(data[0], Mapping) and isinstance(data[1], Mapping) else [data]
    if isinstance(data, (tuple, list)) and any(isinstance(entry, Tensor) for entry in data):
        raise HessianFlowError(
            f"a batch must be a pair (inputs, targets), got {article(data)} of {len(data)}"
        )
    if isinstance(data, Tensor) or (
        isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    ):
        raise HessianFlowError(
            f"data must be a pair (inputs, targets) or an iterable of pairs, got {article(data)}:"
            " batch a data set by torch.utils.data.DataLoader(dataset, batch_size)"
        )
    if isinstance(data, Rewindable):
        data.rewind()
    return data  # type: ignore[no-any-return]


def as_pair(batch: Any) -> Batch:
    """Return a batch as (inputs, targets).

    Raises:
        HessianFlowError: something else.
    """
    if is_list(batch) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, (list, tuple, Mapping)) else ""
    raise HessianFlowError(
        f"a batch must be a pair (inputs, targets), got {article(batch)}{size}: let each item of"
        " the data set, or what collate_fn returns, be (inputs, targets); either may be a dict"
    )


def training_pair(batch: Any) -> Batch:
    """Return (inputs, targets) that agree on the number of examples: progress counts what was
    drawn.

    Raises:
        HessianFlowError: no pair; targets that are a list of mappings; numbers of rows that differ.
    """
    inputs, targets = as_pair(batch)
    if is_list(targets) and targets and _are_alike(targets):
        raise HessianFlowError(
            f"targets must be tensors with one row an example, got {article(targets)} of"
            f" {len(targets)} entries of type {type(targets[0]).__name__}: pad them to tensors in"
            " one dict"
        )
    count, possible = num_examples(targets), _counts(inputs, lists=True) - {1}
    if possible and count not in possible:
        raise HessianFlowError(
            f"inputs of {_listed(possible)} rows do not go with targets of {count}: both must have"
            " one row an example; reshape outputs and targets in the loss"
        )
    return inputs, targets


def _counts(part: Any, *, lists: bool = False) -> set[int]:
    """Return the first dimensions found in a part.

    A list of text or numbers, and one of mappings or dataclasses that are alike, counts by its
    length. With `lists` every other list adds its length: its entries may be one an example.
    """
    if isinstance(part, (Tensor, np.ndarray)):
        return {int(part.shape[0])} if part.ndim else set()
    if isinstance(part, Mapping):
        for name in TARGET_NAMES:
            if name in part and _counts(part[name], lists=lists):
                return _counts(part[name], lists=lists)
    found = set().union(*(_counts(value, lists=lists) for value in entries(part) or ()))
    if not is_list(part) or not part:
        return found
    if not found or _are_alike(part):
        return {len(part)} | (found if lists else set())
    return found | {len(part)} if lists else found


def _are_alike(part: Sequence[Any]) -> bool:
    """Return whether a list holds mappings of the same keys, or dataclasses of one type."""
    if all(isinstance(entry, Mapping) for entry in part):
        return all(entry.keys() == part[0].keys() for entry in part)
    return is_dataclass(part[0]) and all(type(entry) is type(part[0]) for entry in part)


def _listed(counts: set[int]) -> str:
    *head, last = map(str, sorted(counts))
    return f"{', '.join(head)} and {last}" if head else last


_OF_TYPES = ("same dtype", "target dtype", "Found dtype", "scalar type", "Input type (")
"""What torch's errors about two types say: of products, classes, losses, embeddings and
convolutions."""


@contextmanager
def explaining_types(model: nn.Module, batch: Any) -> Iterator[None]:
    """Say which types a forward pass met, and what to convert, if it fails because of one.

    Args:
        model: whose weights have types.
        batch: a pair or a mapping.

    Raises:
        HessianFlowError: in the place of torch's error about two types.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OF_TYPES):
            raise
        weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        parts = batch if is_list(batch) and len(batch) == 2 else (batch, ())
        inputs, targets = (
            ", ".join(sorted({str(t.dtype) for t in tensors_in(part)})) or "none" for part in parts
        )
        raise HessianFlowError(
            f"the model or the loss does not take inputs of {inputs} and targets of {targets} with"
            f" weights of {weights} ({str(error).splitlines()[0]}); convert where examples are"
            " made, such as inputs.float() and, for classes, targets.long()"
        ) from error
