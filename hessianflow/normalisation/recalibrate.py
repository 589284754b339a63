"""Statistics of batch normalisation, measured again when running averages are out of date."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.batches import as_batches, as_pair, to_device
from hessianflow.interfaces import Batch, HessianFlowError, LossFn
from hessianflow.losses import BatchLoss
from hessianflow.measuring import measuring
from hessianflow.normalisation.statistics import moving_layers


def recalibrate(
    model: nn.Module, data: Batch | Iterable[Batch], loss_fn: LossFn | None = None
) -> None:
    """Replace running means and variances by the averages over the batches of `data`.

    The forward passes normalise by the batch, while everything else (dropout) is in evaluation
    mode. Flags, other buffers and random generators are restored; a model without such layers is
    not run. Layers that these passes do not reach (the adversarial half of a split layer, heads
    that run in training only) keep their statistics, and so do frozen ones (:func:`moving_layers`).

    Args:
        model: the model, wrapped or not.
        data: one (inputs, targets) pair or an iterable of pairs, of equal size as in training. With
            a `loss_fn`, the batches may have any form.
        loss_fn: the loss that runs the model on batches that are not pairs, as
            loss_fn(model, batch).

    Raises:
        HessianFlowError: there is no batch.
    """
    layers = moving_layers(model)
    if not layers:
        return
    device = next(model.parameters()).device
    loss = None
    if loss_fn is not None:
        loss = BatchLoss(loss_fn)
    batches = 0
    with measuring(model) as inner, torch.no_grad(), _averaging(layers):
        for batch in as_batches(data):
            if loss is None or loss.takes_pair(batch):
                inputs, _ = as_pair(batch)
                inner(to_device(inputs, device))
            else:
                loss(inner, to_device(batch, device))
            batches += 1
        if batches == 0:
            raise HessianFlowError("recalibration needs at least one batch, got none")
        reached = [layer for layer in layers if layer.num_batches_tracked]
        running = [_statistics(layer) for layer in reached]
        measured = [(one, [tensor.clone() for tensor in one]) for one in running]
    for statistics, values in measured:
        torch._foreach_copy_(statistics, values)


@contextmanager
def _averaging(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let the layers average over batches from scratch, in training mode."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.training = True
        layer.momentum = None  # which is torch's name for a plain average
        layer.reset_running_stats()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    pair = [layer.running_mean, layer.running_var]
    return [tensor for tensor in pair if tensor is not None]
