"""Evaluation that does not disturb training."""

import math
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import (
    as_batches,
    explaining_types,
    map_tensors,
    num_examples,
    to_device,
)
from hessianflow.interfaces import AgreedError, Batch, HessianFlowError, Hits, LossFn, Reducer
from hessianflow.losses import Averaged, BatchLoss, Forwarded, SplitCheck, exact_type, weighted
from hessianflow.measuring import measuring
from hessianflow.training.world import LocalWorld

MARKED_ROWS = 8
"""Rows at the beginning of each tensor that a fingerprint covers. This default is our choice."""
MARKED_NUMBERS = 4096
"""Most numbers in these rows that it covers. This default is our choice."""


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over all examples of the evaluation data, and their number.

    Attributes:
        accuracy: share of hits among the targets that count, which are examples or tokens; None if
            the outputs are not class scores.
    """

    loss: float
    accuracy: float | None
    examples: int


def evaluate(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    loss_fn: LossFn,
    *,
    reducer: Reducer | None = None,
) -> Evaluation:
    """Return the mean loss and accuracy of the model in evaluation mode.

    Mode, buffers and random generators are left as they were. Each batch is weighted by the divisor
    of its mean loss.

    Args:
        model: any module.
        data: one batch or a re-iterable of batches, of any sizes: pairs (inputs, targets), or
            mappings for a loss that runs the model.
        loss_fn: the loss, as in training.
        reducer: of several ranks that hold the same model and data, each of which evaluates its
            share of the batches; None: this process alone.

    Raises:
        HessianFlowError: the data hold no example, or were used up by an earlier iteration; the
            first batches of the ranks differ.

    Warns:
        UserWarning: the loss of a batch is not the weighted mean of its parts' losses, so that the
            mean over batches is not the loss of the data.
    """
    device = next(model.parameters()).device
    ranks = reducer or LocalWorld()
    batch_loss = BatchLoss(loss_fn)
    check_split = SplitCheck(batch_loss.mean)
    with measuring(model) as inner, torch.no_grad():
        # Sums of loss, its weight, hits, targets that count, examples, batches without classes, and
        # of the fingerprint and its square. A tensor made in the caller's inference mode could not
        # be written to here.
        sums = torch.zeros(8, dtype=exact_type(device), device=device)
        for number, batch in enumerate(as_batches(data)):
            if number == 0 and ranks.world_size > 1:
                mark = fingerprint(batch)
                sums[6:] += torch.tensor([mark, mark**2], dtype=sums.dtype, device=device)
            if number % ranks.world_size == ranks.rank:
                local = to_device(batch, device)
                with explaining_types(inner, local):
                    forwarded = batch_loss(inner, local)
                    sums[:6] += _figures(forwarded, num_examples(local), sums)
                if number > 0:
                    _warn_of_parts(check_split, *forwarded.arguments)
    # The only wait for the device.
    every = ranks.sum(sums).tolist()
    loss, weight, correct, counted, examples, unclassified, marks, squares = every
    if marks**2 != squares * ranks.world_size:
        raise AgreedError(
            "the evaluation data differ between ranks, each of which takes its turn of the batches:"
            " pass the same loader on all of them, without a DistributedSampler and not shuffled"
        )
    if examples == 0:
        raise HessianFlowError(
            "the evaluation data hold no example: pass data that can be iterated again, and not the"
            " training data"
        )
    mean = math.nan
    if weight:
        mean = loss / weight
    accuracy: float | None = None
    if counted and not unclassified:
        accuracy = correct / counted
    return Evaluation(mean, accuracy, int(examples))


def _figures(forwarded: Forwarded, examples: int, like: Tensor) -> Tensor:
    averaged = forwarded.averaged
    loss = weighted(averaged.value.to(like), averaged.weight)
    hits = count_hits(*forwarded.arguments, averaged)
    correct, counted = hits or (0, 0)
    figures = [loss, averaged.weight, correct, counted, examples, hits is None]
    return torch.stack(
        [torch.as_tensor(figure, dtype=like.dtype, device=like.device) for figure in figures]
    )


def _warn_of_parts(check_split: SplitCheck, outputs: Any, targets: Any) -> None:
    try:
        check_split(outputs, targets)
    except HessianFlowError as error:
        warnings.warn(
            "the evaluation loss is a mean over batches and not that of all examples at once:"
            f" {error}",
            stacklevel=3,
        )


def count_hits(outputs: Any, targets: Any, averaged: Averaged) -> Hits | None:
    """Return how many targets have the largest score at their class, and how many targets count.

    Scores and targets are class scores [B, classes] and class indices [B], or else the arguments of
    the only class loss that was called, such as one with a target for each token. Without either,
    the result is None. The loss (`averaged`) says which targets count.
    """
    if not _are_classified(outputs, targets, averaged):
        if averaged.classified is None:
            return None
        outputs, targets = averaged.classified
    hit = outputs.argmax(dim=min(1, outputs.ndim - 1)) == targets
    ignored = averaged.ignore_index
    if ignored is None:
        return Hits(hit.sum(), targets.numel())
    if ignored >= 0:  # A negative index is no class of the model, and never a hit.
        hit = hit & (targets != ignored)
    counted = averaged.counted
    if counted is None:
        counted = (targets != ignored).sum()
    return Hits(hit.sum(), counted)


def _are_classified(outputs: Any, targets: Any, averaged: Averaged) -> bool:
    """Return whether outputs and targets are class scores and class indices."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if outputs.ndim != targets.ndim + 1 or targets.dtype.is_floating_point:
        return False
    if outputs.ndim == 2:
        return True
    # If an example has several targets, only a class loss shows that they are classes.
    is_shaped = outputs.ndim > 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    return is_shaped and averaged.ignore_index is not None and averaged.classified is None


def fingerprint(batch: Any) -> int:
    """Return a checksum below 4096 of the beginning of a batch; wait for the device."""
    checksum = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal checksum
        if tensor.layout == torch.strided:
            rows = tensor.detach()
            if rows.ndim > 0:
                rows = rows[:MARKED_ROWS]
            first = rows.reshape(-1)[:MARKED_NUMBERS].cpu().contiguous()
            checksum = zlib.crc32(first.view(torch.uint8).numpy().tobytes(), checksum)
        return tensor

    map_tensors(add, batch)
    return checksum % 4096
