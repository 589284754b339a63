"""Remeasures running statistics that have not settled, at the end of an epoch, before they are
used."""

from typing import Literal

import torch
from torch import nn

from hessianflow.batches import num_examples, split
from hessianflow.interfaces import Batch, LossFn, World
from hessianflow.losses import MeanLoss
from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.normalisation.statistics import compared_losses, is_unsettled, moving_layers

NormStatistics = Literal["settled", "running"]


def settle(
    model: nn.Module, batch: Batch, loss_fn: LossFn, usual_loss: float, size: int, world: World
) -> str:
    """Compare the loss under running and under batch statistics, and remeasure the former if
    needed.

    Statistics measured anew are the plain average over the microbatches of `batch`. During training
    only attacks use them, because attacks run in evaluation mode.

    Args:
        model: the model, in training mode; one without batch normalisation is not run at all.
        batch: the batch trained last, on the device; on several ranks this rank's part of it.
        loss_fn: the loss of the training.
        usual_loss: the usual loss of the training so far; differences that are small beside it are
            ignored.
        size: examples per microbatch.
        world: the ranks, which all come to the same answer.

    Returns:
        A message about what was found; empty where the statistics have settled or the losses do not
        tell.
    """
    layers = moving_layers(model)
    if not layers:
        return ""
    parts = [part for part in split(batch, size) if num_examples(part) > 1]
    # Layers that sum over ranks need the same number of passes on each.
    passes = min(world.gather(len(parts)))
    if passes == 0:
        return ""
    # A wait for the device, once an epoch.
    running, own, weight = compared_losses(model, parts[0], MeanLoss(loss_fn), layers)
    sums = torch.tensor([running * weight, own * weight, weight], dtype=torch.float64)
    running, own, weight = world.sum(sums).tolist()
    if weight == 0 or not is_unsettled(running / weight, own / weight, usual_loss):
        return ""
    recalibrate(model, parts[:passes])
    world.average_buffers()
    return (
        "the running statistics of batch normalisation had not settled (loss"
        f" {running / weight:.4g} under them, {own / weight:.4g} under those of the batch) and were"
        " measured anew on the batch trained last; the row of each epoch where this happens says"
        ' so, and norm_statistics="running" leaves them alone'
    )
