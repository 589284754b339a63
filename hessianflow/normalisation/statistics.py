"""A test of whether the running statistics of batch normalisation match the current weights.

Running means and variances lag behind the weights. Early in training, or just after the batch has
grown, a network evaluated with them is not the function that is trained. A comparison of the loss
of the same examples under running statistics and under their own shows the mismatch. It can be
large: on SqueezeNext after the first epoch the losses were 616,582 and 2.37, and the largest
Hessian eigenvalue was 8e7 before and 87 after the statistics were measured again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.batches import num_examples, take_rows
from hessianflow.losses import BatchLoss, untouched
from hessianflow.measuring import measuring, unwrap

UNSETTLED = 1.5
"""Ratio of the loss under running statistics to that under batch statistics, above which running
statistics have not settled. Our choice: in trainings well under way the ratio was 0.96 to 1.25, and
wherever it was larger, statistics measured again lowered the evaluation loss."""

NEGLIGIBLE = 0.05
"""Differences below this fraction of a training's usual loss are ignored. Our choice: once a
network fits digits, 32 examples have losses such as 0.004 and 0.002 under settled statistics."""

ROWS = 32  # most examples that are compared; each is forwarded twice; our choice


def moving_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers with running statistics that training moves.

    A layer in evaluation mode inside a model in training mode is frozen and left out: its
    statistics are part of the function that is trained. In a model in evaluation mode none counts
    as frozen.
    """
    inner = unwrap(model)
    layers = [m for m in inner.modules() if isinstance(m, _BatchNorm)]
    running = [layer for layer in layers if layer.running_mean is not None]
    return [layer for layer in running if layer.training or not inner.training]


def compared_losses(
    model: nn.Module, batch: Any, batch_loss: BatchLoss, layers: Sequence[_BatchNorm]
) -> tuple[float, float, float]:
    """Return the loss of some examples under running statistics, under their own, and the divisor.

    The model runs in evaluation mode and is restored. Up to ROWS examples of the batch, which is
    on the model's device, are forwarded twice, or the whole batch if the model cannot run on fewer
    or the loss needs gradients. `layers` are the :func:`moving_layers`. All numbers are 0 if
    no target counts, or for a single example, which has no statistics of its own.
    """
    total = num_examples(batch)
    if total < 2:
        return 0.0, 0.0, 0.0
    try:
        # The examples are spread over the batch, because data may be sorted by class.
        few = take_rows(batch, slice(0, None, -(-total // ROWS)), total)
        with torch.no_grad():
            return _both(model, few, batch_loss, layers)
    # A model may raise anything on a batch that it was not made for.
    except Exception:
        return _both(model, batch, batch_loss, layers)


def _both(
    model: nn.Module, batch: Any, batch_loss: BatchLoss, layers: Sequence[_BatchNorm]
) -> tuple[float, float, float]:
    is_graph_wanted = torch.is_grad_enabled()
    with (
        measuring(model) as inner,
        untouched(batch_loss.loss_fn),
        torch.set_grad_enabled(is_graph_wanted),
    ):
        running = batch_loss(inner, batch).averaged
        for layer in layers:  # measuring puts both flags back
            layer.training = True
            layer.track_running_stats = False
        own = batch_loss(inner, batch).averaged
    weight = float(own.weight)
    if weight == 0:
        return 0.0, 0.0, 0.0
    return float(running.value.detach()), float(own.value.detach()), weight


def is_unsettled(running: float, own: float, scale: float = 0.0) -> bool:
    """Return whether the losses under running and own statistics show that the former lag.

    A running loss that is not finite counts as large; if the own one is not, the answer is False.
    `scale` is the usual loss of this training: once examples are fitted, their own losses are small
    and depend on a few of them.
    """
    if not math.isfinite(own):
        return False
    return not running - own <= max((UNSETTLED - 1) * abs(own), NEGLIGIBLE * scale)
