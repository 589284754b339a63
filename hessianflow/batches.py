"""Move and split batches: what every room needs to know about their structure. Sizes are in examples."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Batch, HessianFlowError


def num_examples(batch: Any) -> int:
    """Number of examples: the length of the first tensor found in a tensor, dict, list or tuple.

    Raises:
        HessianFlowError: no tensor in it.
    """
    first = _first_tensor(batch)
    if first is None:
        raise HessianFlowError(f"a batch must hold at least one tensor, found none in a {type(batch).__name__}")
    return int(first.shape[0])


def move(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """The same structure with every tensor on `device`."""
    return map_tensors(lambda t: t.to(device, non_blocking=non_blocking), batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply `function` to every tensor of a tensor, dict, list or tuple; leave everything else as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def split(batch: Batch, size: int | None, group: int | None = None) -> Iterator[Batch]:
    """Cut a batch, in order, into the fewest microbatches of at most `size` examples. None: one piece.

    The pieces are as equal as can be (130 examples at size 128 make 65 + 65): batch normalisation then never sees a
    microbatch of a few examples next to full ones. Of an odd number in twos, one piece has three (:func:`num_parts`).

    Args:
        batch: (inputs, targets).
        size: most examples a piece.
        group: the batch is thought of as the fewest equal groups of at most this many, and a piece that can hold one
            holds whole groups only: what is normalised together does not depend on `size`.
    """
    total = num_examples(batch)
    if size is None or size >= total:
        yield batch
        return
    unit = group if group is not None and group <= size else size
    units = num_parts(total, unit)
    for first in range(0, units, size // unit):
        last = min(first + size // unit, units)
        start, stop = _edge(total, units, first), _edge(total, units, last)
        yield map_tensors(lambda t, a=start, b=stop: t[a:b], batch)  # type: ignore[misc]


def num_parts(total: int, size: int) -> int:
    """The fewest parts of at most `size` examples that leave none alone.

    Batch normalisation cannot train on one example. Equal parts hold fewer than two only where an odd number is cut in
    twos; one part then has three. Parts of one are what was asked for.
    """
    parts = -(-total // size)
    return max(min(parts, total // 2), 1) if size > 1 else parts


def _edge(total: int, parts: int, index: int) -> int:
    """Where part `index` begins when `total` is cut as `torch.tensor_split` does: the first ones are longer by one."""
    return index * (total // parts) + min(index, total % parts)


def as_batches(data: Any) -> Iterable[Any]:
    """One pair, or one dict, as a list of one batch; an iterable of batches as it is.

    A tuple or list of two is a pair unless its second member is one itself, or both are dicts: ((x1, x2), y) is a pair,
    [(x, y), (x, y)] and [{...}, {...}] are two batches.
    """
    if isinstance(data, dict):
        return [data]
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[1], (tuple, list)):
        return data if isinstance(data[0], dict) and isinstance(data[1], dict) else [data]
    return data  # type: ignore[no-any-return]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    for value in values:
        found = _first_tensor(value)
        if found is not None:
            return found
    return None
