"""Whether the running statistics of batch normalisation belong to the weights at hand.

Running means and variances trail behind the weights. Early in a training, after few updates, or where the batch has
just grown, a network that is evaluated with them is another function than the one that is trained: on SqueezeNext its
loss was 616,582 after the first epoch, beside 2.37 with the statistics of the batch, and its largest Hessian eigenvalue
8e7 beside 87 once they were measured anew. The loss of the same examples under both shows it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.batches import num_examples, take_rows
from hessianflow.losses import Averaged, MeanLoss, untouched
from hessianflow.measuring import measuring, unwrap

UNSETTLED = 1.5
"""Loss under running statistics by loss under those of the batch, from which on the former have not settled. Ours:
trainings that were well under way had 0.96 to 1.25, and where the ratio was larger, statistics measured anew gave a
lower evaluation loss each time."""

NEGLIGIBLE = 0.05
"""A difference smaller than this share of a training's usual loss tells nothing. Ours: on digits that are fitted, 32
examples had losses of 0.004 and 0.002 under settled statistics."""

ROWS = 32
"""Examples that are compared: twice so many are forwarded. Ours."""


def moving_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers with running statistics that training moves.

    Frozen layers, those in evaluation mode inside a model in training mode, are left out: their statistics are part of
    the function that is trained. In a model that is in evaluation mode as a whole no layer counts as frozen.
    """
    inner = unwrap(model)
    found = [m for m in inner.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return [layer for layer in found if layer.training] if inner.training else found


def compared_losses(
    model: nn.Module, batch: Any, mean_loss: MeanLoss, layers: Sequence[_BatchNorm]
) -> tuple[float, float, float]:
    """Return the loss of some examples of a batch under running statistics, that under their own, and its weight.

    In evaluation mode; nothing of the model is changed. Up to ROWS examples are forwarded twice, all of the batch where
    the model does not run on fewer, or the loss needs gradients.

    Args:
        model: wrapped or not.
        batch: a pair (inputs, targets) or a dict on the model's device.
        mean_loss: the loss.
        layers: that have running statistics, see :func:`moving_layers`.

    Returns:
        Two mean losses, and what they divide by: 0 where nothing counts, or a single example has no statistics.
    """
    total = num_examples(batch)
    if total < 2:
        return 0.0, 0.0, 0.0
    try:
        # Spread over the batch: data may be sorted by class.
        few = take_rows(batch, slice(0, None, -(-total // ROWS)), total)
        with torch.no_grad():
            return _both(model, few, mean_loss, layers)
    except Exception:  # whatever a model raises on a batch that it was not made for
        return _both(model, batch, mean_loss, layers)


def _both(
    model: nn.Module, batch: Any, mean_loss: MeanLoss, layers: Sequence[_BatchNorm]
) -> tuple[float, float, float]:
    is_graph_wanted = torch.is_grad_enabled()
    with measuring(model) as inner, untouched(mean_loss.loss_fn), torch.set_grad_enabled(is_graph_wanted):
        running = _averaged(inner, batch, mean_loss)
        for layer in layers:  # measuring puts both flags back
            layer.training = True
            layer.track_running_stats = False
        own = _averaged(inner, batch, mean_loss)
    weight = float(own.weight)
    if weight == 0:
        return 0.0, 0.0, 0.0
    return float(running.value.detach()), float(own.value.detach()), weight


def _averaged(model: nn.Module, batch: Any, mean_loss: MeanLoss) -> Averaged:
    if isinstance(batch, Mapping):
        return mean_loss(model, batch)
    return mean_loss(model(batch[0]), batch[1])


def is_unsettled(running: float, own: float, scale: float = 0.0) -> bool:
    """Return whether two mean losses of the same examples show that running statistics have not settled.

    Args:
        running: under running statistics; not finite counts as large.
        own: under those of the examples themselves; where it is not finite, nothing can be told.
        scale: a loss of this training that is not small, for those of examples that are fitted hang on a few of them.
    """
    if not math.isfinite(own):
        return False
    return not running - own <= max((UNSETTLED - 1) * abs(own), NEGLIGIBLE * scale)
