"""Functions that move, count and cut batches. Sizes are in examples.

A batch is a pair (inputs, targets), or one mapping or dataclass for a loss that runs the model
(:mod:`hessianflow.losses.batch_loss`). Its parts are tensors, and mappings (a dict, a `UserDict`,
the output of a tokenizer, a TensorDict), dataclasses, named tuples, lists and tuples of parts. A
cut treats them as follows:

- A tensor or an array whose first dimension is the number of examples is cut, and so is a list or
  tuple with one entry for each example. A mapping, dataclass or named tuple, and a list or tuple of
  tensors, is cut part by part.
- A tensor without a dimension or with a first dimension of 1 belongs to all examples, and so do
  text, numbers and None: they are kept whole.
- Anything else might be either, and is refused by name.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hessianflow.interfaces import Batch, HessianFlowError, Rewindable
from hessianflow.structure import (
    are_alike,
    article,
    described,
    entries,
    entry_names,
    is_list,
    is_named_tuple,
    is_plain,
    mapped,
    reading,
    rebuilt,
    row_counts,
    tensors_in,
)


def num_examples(batch: Any) -> int:
    """Return the number of examples of a batch, or of its targets.

    This is the first dimension of the targets of a pair, or of the entry that holds the targets of
    a mapping (:data:`hessianflow.structure.TARGET_NAMES`), or of the inputs without such tensors.

    Raises:
        HessianFlowError: there is no tensor with a dimension, or there are several first dimensions
            and no targets to decide between them.
    """
    decisive = batch
    has_targets = is_pair(batch)
    if has_targets:
        decisive = batch[1]
    if isinstance(decisive, Tensor) and decisive.ndim > 0:
        return int(decisive.shape[0])
    if is_list(batch) and not batch:
        return 0
    counts = row_counts(batch)
    if has_targets:
        inputs, targets = (row_counts(part) for part in batch)
        counts = targets or inputs or counts
        if len(counts) > 1:
            counts = counts & inputs or counts
    if len(counts) == 1:
        return counts.pop()
    if counts:
        raise HessianFlowError(
            f"cannot tell the number of examples of {article(batch)} whose entries have"
            f" {_listed(counts)} rows: pass a pair (inputs, targets), or call the entry with one"
            " row for each example 'labels'"
        )
    raise HessianFlowError(
        "a batch must hold at least one tensor with a row for each example, found none in"
        f" {article(batch)}: pass batches, such as next(iter(loader)), and not a loader or a single"
        " example"
    )


def to_device(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """Return the same structure with tensors, and other objects with a method `to`, on `device`."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return mapped(moved, batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return the same structure with `function` applied to every tensor."""

    def applied(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return mapped(applied, batch)


def split(batch: Batch, size: int | None, group: int | None = None) -> Iterator[Batch]:
    """Cut a batch, in order, into the fewest microbatches of at most `size` examples.

    The pieces are as equal as possible (130 examples at size 128 make 65 + 65): batch normalisation
    then never sees a microbatch of a few examples next to full ones. An odd number cut in twos has
    one piece of three (:func:`num_parts`).

    Args:
        batch: (inputs, targets), or one mapping.
        size: most examples in a piece; None leaves the batch in one piece.
        group: most examples that are normalised together. The batch is divided into the fewest
            equal groups of at most this size, and a piece that can hold a group holds whole groups
            only, so that the groups do not depend on `size`.

    Raises:
        HessianFlowError: as :func:`take_rows`.
    """
    total = num_examples(batch)
    if size is None or size >= total:
        yield batch
        return
    unit = size
    if group is not None and group <= size:
        unit = group
    units = num_parts(total, unit)
    for first in range(0, units, size // unit):
        last = min(first + size // unit, units)
        yield take_rows(batch, slice(_edge(total, units, first), _edge(total, units, last)), total)


def take_rows(part: Any, rows: slice | Tensor, total: int, name: str = "") -> Any:
    """Return some examples of a batch or of one of its parts.

    Entries that belong to all examples stay whole.

    Args:
        part: a pair or a mapping or, with a name, a part of one.
        rows: the examples: a slice, or indices int64 [n].
        total: number of examples in `part`.
        name: name of the part in errors; the parts of a pair are "inputs" and "targets".

    Raises:
        HessianFlowError: an entry has another length, or a list can be read in two ways.
    """
    if isinstance(part, Tensor) and part.ndim > 0 and part.shape[0] == total:
        return part[rows]
    if isinstance(part, (Tensor, np.ndarray)):
        if _has_rows(part, total, name):
            return _cut(part, rows)
        return part
    if is_plain(part):
        return part
    values = entries(part)
    if values is None:
        raise HessianFlowError(
            f"{name or 'batch'} is {article(part)}, whose rows are not known: it cannot be cut into"
            " parts; use tensors in dicts, or leave the batch in one piece"
        )
    has_targets = not name and is_pair(part)
    if not has_targets and is_list(part) and _is_one_an_example(part, total, name):
        return type(part)(values[number] for number in _numbers(rows, total))
    names = ["inputs", "targets"]
    if not has_targets:
        names = [(name or "batch") + entry for entry in entry_names(part)]
    return rebuilt(part, [take_rows(v, rows, total, n) for v, n in zip(values, names, strict=True)])


def _cut(part: Tensor | np.ndarray[Any, Any], rows: slice | Tensor) -> Any:
    if isinstance(part, np.ndarray) and isinstance(rows, Tensor):
        return part[rows.cpu().numpy()]
    return part[rows]


def _has_rows(part: Tensor | np.ndarray[Any, Any], total: int, name: str) -> bool:
    """Return whether each example has a row, False if the whole belongs to all, or refuse it."""
    kind = reading(part, total)
    if kind == "unknown":
        raise HessianFlowError(
            f"{name or 'batch'} has {part.shape[0]} rows in a batch of {total} examples and cannot"
            " be cut with them: if all examples share it, give it a first dimension of 1"
            " (t[None]); if they have several rows each, pad these to one"
        )
    return kind == "rows"


def _is_one_an_example(part: Sequence[Any], total: int, name: str) -> bool:
    """Return whether each entry of a list belongs to one example, not to all, or refuse it."""
    if len(part) != total:
        return False
    readings = {reading(entry, total) for entry in part}
    can_be_cut = "rows" in readings and "unknown" not in readings
    if can_be_cut and total > 1:
        raise HessianFlowError(
            f"{name or 'batch'} is a {type(part).__name__} of {total} entries of {total} rows in a"
            f" batch of {total} examples: does each example have an entry, or a row? Use a dict, or"
            " leave this batch in one piece"
        )
    return not can_be_cut


def _numbers(rows: slice | Tensor, total: int) -> Iterable[int]:
    if isinstance(rows, slice):
        return range(*rows.indices(total))
    # The host waits for the device only if a batch holds lists, whose entries are on the host.
    return rows.tolist()


def num_parts(total: int, size: int) -> int:
    """Return the fewest parts of at most `size` examples that leave no example alone.

    Batch normalisation cannot train on one example. Equal parts hold fewer than two only where an
    odd number is cut in twos; one part then has three. A size of 1 is taken literally.
    """
    if size == 1:
        return total
    return max(min(-(-total // size), total // 2), 1)


def _edge(total: int, parts: int, index: int) -> int:
    """Return the start of a part of `total`, which is cut as by `torch.tensor_split`."""
    return index * (total // parts) + min(index, total % parts)


def as_batches(data: Any) -> Iterable[Any]:
    """Return one pair or mapping as a list of one batch, and an iterable of batches unchanged.

    A tuple or list of two is a pair unless its second member is a tuple or list and its first no
    tensor, or both are mappings: ((x1, x2), y) and (x, (y1, y2)) are pairs, [(x, y), (x, y)] and
    [{...}, {...}] are two batches. Data with a method `rewind()`, such as the streams of `hf.data`,
    are put to the first of their batches, so that the rest of an epoch does not pass for the whole.

    Raises:
        HessianFlowError: the data are a tensor, tensors that are no pair, or single examples.
    """
    if isinstance(data, Mapping) or (is_named_tuple(data) and not is_pair(data)):
        return [data]
    if dataclasses.is_dataclass(data) and not isinstance(data, (type, Iterable)):
        return [data]
    if isinstance(data, (tuple, list)) and len(data) == 2:
        first, second = data
        are_two_batches = isinstance(first, Mapping) and isinstance(second, Mapping)
        if isinstance(first, Tensor):
            return [data]
        if not isinstance(second, (tuple, list)) and not are_two_batches:
            return [data]
    if isinstance(data, (tuple, list)) and any(isinstance(entry, Tensor) for entry in data):
        raise HessianFlowError(f"a batch must be a pair (inputs, targets), got {described(data)}")
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


def is_pair(batch: Any) -> bool:
    """Return whether a batch is a pair (inputs, targets): a list or tuple of two."""
    return isinstance(batch, (list, tuple)) and len(batch) == 2


def as_pair(batch: Any) -> Batch:
    """Return a batch as (inputs, targets).

    Raises:
        HessianFlowError: the batch is not a pair.
    """
    if is_pair(batch):
        return batch[0], batch[1]
    raise HessianFlowError(
        f"a batch must be a pair (inputs, targets), got {described(batch)}: let each item of the"
        " data set, or the result of collate_fn, be (inputs, targets); either may be a dict. Or"
        " pass a loss of model and batch, such as hf.ModelLoss()"
    )


def training_pair(batch: Any) -> Batch:
    """Return (inputs, targets) that agree on the number of examples, by which progress is counted.

    Raises:
        HessianFlowError: the batch is no pair, its targets are a list of mappings, or rows differ.
    """
    inputs, targets = as_pair(batch)
    if is_list(targets) and targets and are_alike(targets):
        raise HessianFlowError(
            f"targets must be tensors with one row for each example, got {article(targets)} of"
            f" {len(targets)} entries of type {type(targets[0]).__name__}: pad them to tensors in"
            " one dict"
        )
    count = num_examples(targets)
    possible = row_counts(inputs, lists=True) - {1}
    if possible and count not in possible:
        raise HessianFlowError(
            f"inputs of {_listed(possible)} rows do not go with targets of {count}: both must have"
            " one row for each example; reshape outputs and targets in the loss"
        )
    return inputs, targets


def _listed(counts: set[int]) -> str:
    *head, last = map(str, sorted(counts))
    if not head:
        return last
    return f"{', '.join(head)} and {last}"


_OF_TYPES = ("same dtype", "target dtype", "Found dtype", "scalar type", "Input type (")
"""Phrases of torch's errors over two types: products, classes, losses, embeddings, convolutions."""


@contextmanager
def explaining_types(model: nn.Module, batch: Any) -> Iterator[None]:
    """Name the types of a forward pass of `model` on `batch`, if it fails because of a type.

    Raises:
        HessianFlowError: torch raised an error about two types; the message says what to convert.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OF_TYPES):
            raise
        weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        parts = batch
        if not is_list(batch) or len(batch) != 2:
            parts = (batch, ())
        inputs, targets = (
            ", ".join(sorted({str(t.dtype) for t in tensors_in(part)})) or "none" for part in parts
        )
        raise HessianFlowError(
            f"the model or the loss does not take inputs of {inputs} and targets of {targets} with"
            f" weights of {weights} ({str(error).splitlines()[0]}); convert where examples are"
            " made, such as inputs.float() and, for classes, targets.long()"
        ) from error
