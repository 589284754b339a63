"""Running statistics that have not settled are measured anew at the end of an epoch, before anything rests on them."""

from typing import Literal

import torch
from torch import nn

from hessianflow.batches import num_examples, split
from hessianflow.interfaces import Batch, LossFn, World
from hessianflow.losses import MeanLoss
from hessianflow.norm_statistics import compared_losses, is_unsettled, moving_layers
from hessianflow.training.recalibrate import recalibrate

NormStatistics = Literal["settled", "running"]


def settle(model: nn.Module, batch: Batch, loss_fn: LossFn, usual_loss: float, size: int, world: World) -> str:
    """Compare the loss under running statistics with that under the batch's own; if need be, measure the former anew.

    They become the plain average over the microbatches of `batch`. In training only attacks meet
    them, which run in evaluation mode.

    Args:
        model: in training mode; one without batch normalisation is not run at all.
        batch: the one trained last, on the device; on several ranks this rank's part of it.
        loss_fn: of the training.
        usual_loss: of the training so far; small differences beside it tell nothing.
        size: examples of a microbatch.
        world: the ranks, which agree.

    Returns:
        What was found, in words; empty where the statistics have settled, or nothing can be told.
    """
    layers = moving_layers(model)
    if not layers:
        return ""
    parts = [part for part in split(batch, size) if num_examples(part) > 1]
    # Where layers sum over ranks, all must run as often.
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
        f"the running statistics of batch normalisation had not settled (loss {running / weight:.4g} under them, "
        f"{own / weight:.4g} under those of the batch) and were measured anew on the batch trained last; the row of "
        'each epoch where this happens says so, and norm_statistics="running" leaves them alone'
    )
