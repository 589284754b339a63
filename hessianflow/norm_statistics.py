"""Whether the running statistics of batch normalisation belong to the weights at hand.

Running means and variances trail behind the weights. Early in a training, after few updates, or where the batch has
just grown, a network that is evaluated with them is another function than the one that is trained: on SqueezeNext its
loss was 616,582 after the first epoch, beside 2.37 with the statistics of the batch, and its largest Hessian eigenvalue
8e7 beside 87 once they were measured anew. The loss of the same examples under both shows it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.batches import num_examples
from hessianflow.losses import MeanLoss, untouched
from hessianflow.measuring import measuring, unwrap

UNSETTLED = 1.5
"""Loss under running statistics by loss under those of the batch, from which on the former have not settled. Ours:
trainings that were well under way had 0.96 to 1.25, and where the ratio was larger, statistics measured anew gave a
lower evaluation loss each time."""


def moving_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers with running statistics that training moves.

    Frozen layers, those in evaluation mode inside a model in training mode, are left out: their statistics are part of
    the function that is trained. In a model that is in evaluation mode as a whole no layer counts as frozen.
    """
    inner = unwrap(model)
    found = [m for m in inner.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return [layer for layer in found if layer.training] if inner.training else found


def loss_sums(
    model: nn.Module, pieces: Iterable[Any], mean_loss: MeanLoss, own: Sequence[_BatchNorm] = ()
) -> tuple[float, float]:
    """Return the summed loss over some pieces and its weight, in evaluation mode; nothing of the model is changed.

    Args:
        model: wrapped or not.
        pieces: pairs (inputs, targets) or dicts on the model's device, each forwarded at once. Those of a single
            example are left out: they have no statistics.
        mean_loss: the loss.
        own: layers that normalise by the statistics of each piece; all others use their running ones.
    """
    total = 0.0
    weights = 0.0
    with measuring(model) as inner, untouched(mean_loss.loss_fn):
        for layer in own:  # measuring puts both flags back
            layer.training = True
            layer.track_running_stats = False
        for piece in pieces:
            if num_examples(piece) < 2:
                continue
            if isinstance(piece, Mapping):
                averaged = mean_loss(inner, piece)
            else:
                averaged = mean_loss(inner(piece[0]), piece[1])
            weight = float(averaged.weight)
            if weight > 0:
                total += weight * float(averaged.value.detach())
                weights += weight
    return total, weights


def is_unsettled(running: float, own: float) -> bool:
    """Return whether two mean losses of the same examples show that running statistics have not settled.

    Args:
        running: under running statistics; not finite counts as large.
        own: under those of the examples themselves; where it is not finite, nothing can be told.
    """
    if not math.isfinite(own):
        return False
    return not running - own <= (UNSETTLED - 1) * abs(own)
