"""Evaluation that does not disturb training."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import mean_loss, move, num_examples
from hessianflow.interfaces import Batch, LossFn
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
        Figures weighted by examples, so that a short last batch counts for what it holds.
    """
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    examples, classified = 0, True
    with measuring(model) as inner, torch.no_grad():
        for inputs, targets in as_batches(data):
            inputs, targets = move(inputs, device), move(targets, device)
            outputs = inner(inputs)
            count = num_examples(targets)
            loss_sum += mean_loss(loss_fn, outputs, targets).to(loss_sum) * count
            hits = count_correct(outputs, targets)
            if hits is None:
                classified = False
            else:
                correct += hits
            examples += count
    # The one wait for the device: the figures leave it here.
    return Evaluation(loss_sum.item() / examples, correct.item() / examples if classified else None, examples)


def as_batches(data: Batch | Iterable[Batch]) -> Iterable[Batch]:
    """A pair as a one-element list; an iterable of pairs as it is."""
    if isinstance(data, tuple) and len(data) == 2 and not _is_pair(data[0]):
        return [data]
    return data


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


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2
