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
    as_pair,
    explaining_types,
    map_tensors,
    move,
    num_examples,
)
from hessianflow.interfaces import AgreedError, Batch, HessianFlowError, Hits, LossFn, Reducer
from hessianflow.losses import Averaged, MeanLoss, SplitCheck, exact_type, weighted
from hessianflow.measuring import measuring
from hessianflow.training.world import LocalWorld

MARKED_ROWS, MARKED_NUMBERS = 8, 4096
"""Rows, and numbers in them, at the beginning of each tensor that a fingerprint looks at. Ours."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over all examples.

    Attributes:
        loss: the mean.
        accuracy: share of hits among the targets that count; None where outputs are not class
            scores.
        examples: how many.
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
    """Return the mean loss and accuracy of the model in evaluation mode; mode, buffers and random
    generators are left as found.

    Args:
        model: any module.
        data: one (inputs, targets) pair or a re-iterable of pairs, of any sizes.
        loss_fn: as in training.
        reducer: of several ranks, which hold the same model and data: each takes its turn of the
            batches.

    Returns:
        Figures weighted by what each batch's mean divides by, so that a short last batch counts for
            what it holds.

    Raises:
        HessianFlowError: the data hold no example, or were used up by an iteration before; ranks
            have other data, by the first batch.

    Warns:
        UserWarning: the loss of a batch is not the weighted mean of its parts' losses, so that the
            mean over batches is not the loss of the data.
    """
    device = next(model.parameters()).device
    ranks = LocalWorld() if reducer is None else reducer
    mean_loss = MeanLoss(loss_fn)
    check_split = SplitCheck(mean_loss)
    # Sums of loss, of what it divides by, of hits, targets that count, examples, and batches
    # without classes.
    with measuring(model) as inner, torch.no_grad():
        # Made within it: outside, the caller may be in inference mode, whose tensors cannot be
        # written to here.
        sums = torch.zeros(8, dtype=exact_type(device), device=device)
        for number, batch in enumerate(as_batches(data)):
            if number == 0 and ranks.world_size > 1:
                mark = fingerprint(batch)
                sums[6:] += torch.tensor([mark, mark**2], dtype=sums.dtype, device=device)
            if number % ranks.world_size == ranks.rank:
                inputs, targets = as_pair(move(batch, device))
                with explaining_types(inner, (inputs, targets)):
                    outputs = inner(inputs)
                    sums[:6] += _figures(outputs, targets, mean_loss, sums)
                if number > 0:
                    _warn_of_parts(check_split, outputs, targets)
    # The one wait for the device: the figures leave it here.
    loss, weight, correct, counted, examples, unclassified, marks, squares = ranks.sum(
        sums
    ).tolist()
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
    accuracy = None if unclassified or not counted else correct / counted
    return Evaluation(loss / weight if weight else math.nan, accuracy, int(examples))


def _figures(outputs: Any, targets: Any, mean_loss: MeanLoss, like: Tensor) -> Tensor:
    averaged = mean_loss(outputs, targets)
    loss = weighted(averaged.value.to(like), averaged.weight)
    hits = count_hits(outputs, targets, averaged)
    correct, counted = (0, 0) if hits is None else hits
    figures = [loss, averaged.weight, correct, counted, num_examples(targets), hits is None]
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
    """Count the rows whose largest score is at the target class.

    Args:
        outputs: scores, shape [B, classes].
        targets: class indices, shape [B].
        averaged: the loss, which tells which targets count.

    Returns:
        None where `outputs` and `targets` are not of that kind.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.ndim != 2 or targets.ndim != 1 or targets.dtype.is_floating_point:
        return None
    hit = outputs.argmax(dim=1) == targets
    ignored = averaged.ignore_index
    if ignored is None:
        return Hits(hit.sum(), len(targets))
    if ignored >= 0:  # no class of the model has another index
        hit = hit & (targets != ignored)
    counted = (targets != ignored).sum() if averaged.counted is None else averaged.counted
    return Hits(hit.sum(), counted)


def fingerprint(batch: Any) -> int:
    """Return a number below 4096 that tells most batches apart, from the beginning of their
    tensors.

    Waits for the device.
    """
    found = [0]

    def add(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            rows = tensor.detach()[:MARKED_ROWS] if tensor.ndim else tensor.detach()
            first = rows.reshape(-1)[:MARKED_NUMBERS].cpu().contiguous()
            found[0] = zlib.crc32(first.view(torch.uint8).numpy().tobytes(), found[0])
        return tensor

    map_tensors(add, batch)
    return found[0] % 4096
