"""Divisors of means, and those of torch's own losses."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessianflow.batches import num_examples
from hessianflow.interfaces import LossFn

Weight = int | float | Tensor
"""The divisor of a mean. A tensor is a scalar that stays on the device, so that the host does not
wait for it."""

# Losses that divide by the class weights of the targets that are not ignored, in both forms.
CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
CLASS_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)
# Losses whose mean divides by the number of elements.
ELEMENTWISE_FUNCTIONS = (
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    *(functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits),
    *(functional.kl_div, functional.poisson_nll_loss, functional.gaussian_nll_loss),
    *(functional.soft_margin_loss, functional.hinge_embedding_loss),
)
# Elementwise losses that broadcast outputs and targets of different shapes.
BROADCASTING_LOSSES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
    *(nn.KLDivLoss, nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
)
IGNORE_INDEX = -100  # the class of targets that do not count, unless a loss says otherwise (torch)
_DEFAULTS = {"reduction": "mean", "weight": None, "ignore_index": IGNORE_INDEX}


def weighted(mean: Tensor, weight: Weight) -> Tensor:
    """Return mean * weight, but 0 where the weight is 0 and the mean therefore 0 / 0."""
    product = mean * weight
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, product, 0.0)
    if weight > 0:
        return product
    return torch.zeros_like(product)


def exact_type(device: torch.device) -> torch.dtype:
    """Return the type of counts and long sums: float64, or float32 on a device without it.

    Integers would divide in torch's default type; float64 keeps ratios exact for float64 models.
    """
    if device.type == "mps":
        return torch.float32
    return torch.float64


def as_weight(count: Tensor) -> Tensor:
    """Return a divisor as a weight: without a graph, in the type of counts."""
    return count.detach().to(exact_type(count.device))


def class_weight(targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the sum of the class weights of all targets not ignored, a scalar on their device.

    The targets are class indices of any shape. The weights have shape [classes]; None counts each
    as 1.
    """
    counted: Tensor = targets != ignore_index
    exact = exact_type(targets.device)
    if weight is None:
        return counted.sum(dtype=exact)
    total: Tensor = weight[targets.clamp(0, len(weight) - 1)].mul(counted).sum(dtype=exact)
    return total


def is_torchs(loss_fn: LossFn) -> bool:
    """Return whether a call of `loss_fn` is one of torch's losses and nothing else.

    A `functools.partial` of one is; a subclass with a forward of its own is not.
    """
    innermost = _innermost(loss_fn)
    if isinstance(innermost, nn.Module):
        return type(innermost).forward.__module__ == nn.modules.loss.__name__
    return getattr(innermost, "__module__", None) == functional.__name__


def known_weight(loss_fn: LossFn, targets: Any) -> Weight:
    """Return the divisor of the mean of one of torch's losses over these targets."""
    if not counts_classes(loss_fn, targets) or setting(loss_fn, "reduction") != "mean":
        return num_examples(targets)
    return class_weight(targets, setting(loss_fn, "weight"), setting(loss_fn, "ignore_index"))


def counts_classes(loss_fn: LossFn, targets: Any) -> bool:
    """Return whether one of torch's losses takes these targets as class indices."""
    innermost = _innermost(loss_fn)
    by_class = isinstance(innermost, CLASS_LOSSES) or innermost in CLASS_FUNCTIONS
    return by_class and isinstance(targets, Tensor) and not targets.is_floating_point()


def mixes_rows(loss_fn: LossFn, outputs: Any, targets: Any) -> bool:
    """Return whether one of torch's losses compares a row's outputs with the targets of others.

    It does where broadcasting does not pair the rows: outputs [N, 1] and targets [N] become [N, N].
    """
    innermost = _innermost(loss_fn)
    if not isinstance(innermost, BROADCASTING_LOSSES) and innermost not in ELEMENTWISE_FUNCTIONS:
        return False
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    return outputs.ndim != targets.ndim or outputs.shape[:1] != targets.shape[:1]


def setting(loss_fn: Any, name: str) -> Any:
    """Return an option of a loss: a module's attribute, a partial's keyword, or the default."""
    while isinstance(loss_fn, partial):
        if name in loss_fn.keywords:
            return loss_fn.keywords[name]
        loss_fn = loss_fn.func
    return getattr(loss_fn, name, _DEFAULTS[name])


def _innermost(loss_fn: Any) -> Any:
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    return loss_fn
