"""Evaluation that does not disturb training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import as_batches, as_pair, loss_weight, mean_loss, move, num_examples
from hessianflow.interfaces import Batch, HessianFlowError, LossFn, Reducer
from hessianflow.measuring import measuring
from hessianflow.training.world import LocalWorld


@dataclass(frozen=True)
class Evaluation:
    """Means over all examples; `accuracy` is None where outputs are not class scores."""

    loss: float
    accuracy: float | None
    examples: int


def evaluate(
    model: nn.Module, data: Batch | Iterable[Batch], loss_fn: LossFn, *, reducer: Reducer | None = None
) -> Evaluation:
    """Mean loss and accuracy of the model in evaluation mode; mode, buffers and random generators are left as found.

    Args:
        model: any module.
        data: one (inputs, targets) pair or a re-iterable of pairs, of any sizes.
        loss_fn: as in training.
        reducer: of several ranks, which hold the same model and data: each takes its turn of the batches.

    Returns:
        Figures weighted by what each batch's mean divides by, so that a short last batch counts for what it holds.

    Raises:
        HessianFlowError: the data hold no example, or were used up by an iteration before.
    """
    device = next(model.parameters()).device
    ranks = LocalWorld() if reducer is None else reducer
    # Sums of loss, of what it divides by, of hits, examples, and batches without classes.
    sums = torch.zeros(5, dtype=float64_on(device), device=device)
    with measuring(model) as inner, torch.no_grad():
        for number, batch in enumerate(as_batches(data)):
            if number % ranks.world_size == ranks.rank:
                inputs, targets = as_pair(move(batch, device))
                sums += _figures(inner(inputs), targets, loss_fn, sums)
    # The one wait for the device: the figures leave it here.
    loss, weight, correct, examples, unclassified = ranks.sum(sums).tolist()
    if examples == 0:
        raise HessianFlowError(
            "the evaluation data hold no example: pass data that can be iterated again, and not the training data"
        )
    accuracy = None if unclassified else correct / examples
    return Evaluation(loss / weight if weight else math.nan, accuracy, int(examples))


def _figures(outputs: Any, targets: Any, loss_fn: LossFn, like: Tensor) -> Tensor:
    weight = loss_weight(loss_fn, targets)
    loss = weighted(mean_loss(loss_fn, outputs, targets).to(like), weight)
    hits = count_correct(outputs, targets)
    count = num_examples(targets)
    figures = [loss, weight, 0 if hits is None else hits, count, 1 if hits is None else 0]
    return torch.stack([torch.as_tensor(figure, dtype=like.dtype, device=like.device) for figure in figures])


def weighted(loss: Tensor, weight: float | Tensor) -> Tensor:
    """loss * weight, and 0 where a batch weighs nothing: all its targets are ignored, and its mean is 0 / 0."""
    product = loss * weight
    return torch.where(weight > 0, product, 0.0) if isinstance(weight, Tensor) else product


def float64_on(device: torch.device) -> torch.dtype:
    """float64 for sums over many batches, float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_correct(outputs: Any, targets: Any) -> Tensor | None:
    """Number of rows whose largest score is at the target class, as a tensor on the device.

    Returns:
        None where `outputs` [B, classes] and integer `targets` [B] are not what the pair is.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.ndim != 2 or targets.ndim != 1 or targets.dtype.is_floating_point:
        return None
    return (outputs.argmax(dim=1) == targets).sum()
