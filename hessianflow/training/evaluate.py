"""Evaluation that does not disturb training."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import as_batches, loss_weight, mean_loss, move, num_examples
from hessianflow.interfaces import Batch, HessianFlowError, LossFn
from hessianflow.measuring import measuring


@dataclass(frozen=True)
class Evaluation:
    """Means over all examples; `accuracy` is None where outputs are not class scores."""

    loss: float
    accuracy: float | None
    examples: int


def evaluate(model: nn.Module, data: Batch | Iterable[Batch], loss_fn: LossFn) -> Evaluation:
    """Mean loss and accuracy of the model in evaluation mode; mode, buffers and random generators are left as found.

    Args:
        model: any module.
        data: one (inputs, targets) pair or a re-iterable of pairs, of any sizes.
        loss_fn: as in training.

    Returns:
        Figures weighted by what each batch's mean divides by, so that a short last batch counts for what it holds.

    Raises:
        HessianFlowError: the data hold no example, or were used up by an iteration before.
    """
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=float64_on(device), device=device)
    weight_sum = torch.zeros_like(loss_sum)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    examples, classified = 0, True
    with measuring(model) as inner, torch.no_grad():
        for inputs, targets in as_batches(data):
            inputs, targets = move(inputs, device), move(targets, device)
            outputs = inner(inputs)
            count = num_examples(targets)
            weight = loss_weight(loss_fn, targets)
            loss_sum += weighted(mean_loss(loss_fn, outputs, targets).to(loss_sum), weight)
            weight_sum += weight
            hits = count_correct(outputs, targets)
            if hits is None:
                classified = False
            else:
                correct += hits
            examples += count
    if examples == 0:
        raise HessianFlowError(
            "the evaluation data hold no example: pass data that can be iterated again, and not the training data"
        )
    # The one wait for the device: the figures leave it here.
    return Evaluation((loss_sum / weight_sum).item(), correct.item() / examples if classified else None, examples)


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
