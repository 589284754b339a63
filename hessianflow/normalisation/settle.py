"""A remedy at the end of an epoch for running statistics that have not settled."""

from typing import Literal

import torch
from torch import nn

from hessianflow.batches import num_examples, split
from hessianflow.interfaces import Batch, LossFn, World
from hessianflow.losses import BatchLoss
from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.normalisation.statistics import compared_losses, is_unsettled, moving_layers

NormStatistics = Literal["settled", "running"]


def settle(
    model: nn.Module, batch: Batch, loss_fn: LossFn, usual_loss: float, size: int, world: World
) -> str:
    """Compare the loss under running and batch statistics, and replace running ones if they lag.

    The new statistics are the plain average over the microbatches of `batch`. During training only
    attacks use them, because attacks run in evaluation mode.

    Args:
        model: the model, in training mode; one without batch normalisation is not run.
        batch: the batch trained last, on the device; on several ranks this rank's part of it.
        loss_fn: the loss of the training.
        usual_loss: the usual loss of the training so far; small differences beside it do not count.
        size: examples per microbatch.
        world: the ranks, which all come to the same result.

    Returns:
        A message if the statistics were replaced, otherwise an empty text.
    """
    layers = moving_layers(model)
    if not layers:
        return ""
    microbatches = [one for one in split(batch, size) if num_examples(one) > 1]
    # Layers that sum over ranks need the same number of passes on each.
    passes = min(world.gather(len(microbatches)))
    if passes == 0:
        return ""
    # The host waits for the device here, once an epoch.
    running, own, weight = compared_losses(model, microbatches[0], BatchLoss(loss_fn), layers)
    sums = torch.tensor([running * weight, own * weight, weight], dtype=torch.float64)
    running, own, weight = world.sum(sums).tolist()
    if weight == 0 or not is_unsettled(running / weight, own / weight, usual_loss):
        return ""
    recalibrate(model, microbatches[:passes], loss_fn)
    world.average_buffers()
    return (
        "the running statistics of batch normalisation had not settled (loss"
        f" {running / weight:.4g} under them, {own / weight:.4g} under those of the batch) and were"
        " measured again on the batch trained last; the row of each epoch where this happens says"
        ' so, and norm_statistics="running" leaves them alone'
    )
