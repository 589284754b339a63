"""Move, split, weigh: what every room needs to know about a batch. Sizes are in examples."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Batch, HessianFlowError, LossFn


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


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Cut a batch, in order, into the fewest microbatches of at most `size` examples. None: one piece.

    The pieces are as equal as can be (130 examples at size 128 make 65 + 65): batch normalisation then never sees a
    microbatch of a few examples next to full ones.
    """
    total = num_examples(batch)
    pieces = 1 if size is None else max(1, -(-total // size))
    if pieces == 1:
        yield batch
        return
    for piece in range(pieces):
        start, stop = piece * total // pieces, (piece + 1) * total // pieces
        yield map_tensors(lambda t, a=start, b=stop: t[a:b], batch)  # type: ignore[misc]


def mean_loss(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """The mean loss over the examples of one batch, a scalar, whatever reduction `loss_fn` uses.

    A scalar counts as a mean unless `loss_fn` (or the function a `functools.partial` wraps) says `reduction="sum"`; a
    vector counts as one value per example.
    """
    loss = loss_fn(outputs, targets)
    if loss.ndim > 0:
        return loss.mean()
    if _reduction(loss_fn) == "sum":
        return loss / num_examples(targets)
    return loss


def _reduction(loss_fn: LossFn) -> str:
    if isinstance(loss_fn, partial) and "reduction" in loss_fn.keywords:
        return str(loss_fn.keywords["reduction"])
    return str(getattr(loss_fn, "reduction", "mean"))


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    for value in values:
        found = _first_tensor(value)
        if found is not None:
            return found
    return None
