"""Split batch normalisation: one set of statistics for clean examples, one for adversarial ones.

Xie et al., "Adversarial examples improve image recognition" (AdvProp), arXiv 1911.09665; used by
ConAdv, arXiv 2106.00221. Clean and adversarial images have different distributions; with one set of
statistics the running ones become a mixture and clean accuracy falls.

A batch is one concatenation, clean rows first: each layer splits it where :func:`clean_rows` says,
so that a step is one forward and one backward pass also under DistributedDataParallel. Everything
else, evaluation and export included, uses the main set.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class SplitBatchNorm(nn.Module):
    """A main and an adversarial batch normalisation in one layer.

    Attributes:
        main: the layer that was converted, itself: its parameters stay those an optimizer already
            holds.
        adversarial: a copy of it, with affine parameters of its own or shared ones.
        clean: leading rows normalised by `main`, the rest by `adversarial`; None: all by `main`.
            Set it through :func:`clean_rows`.
    """

    def __init__(self, main: nn.modules.batchnorm._BatchNorm, *, share_affine: bool) -> None:
        super().__init__()
        self.main = main
        self.adversarial = copy.deepcopy(main)
        if share_affine:
            self.adversarial.weight, self.adversarial.bias = main.weight, main.bias
        self.clean: int | None = None
        self.train(main.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the first `clean` rows by the main set, the rest by the adversarial one."""
        if self.clean is None or self.clean >= len(x):
            parts = [self.main(x)]
        elif self.clean == 0:
            parts = [self.adversarial(x)]
        else:
            parts = [self.main(x[: self.clean]), self.adversarial(x[self.clean :])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_batch_norm(model: nn.Module, *, share_affine: bool = False) -> nn.Module:
    """Give every batch normalisation of a model a second, adversarial set.

    The layers are replaced in place; make the optimizer afterwards, or add the new parameters to
    it, unless the affine ones are shared.

    Args:
        model: any module with batch normalisation.
        share_affine: one scale and shift for both sets (statistics are always separate). Default
            (AdvProp): False.

    Returns:
        The model (a new layer if it was itself a batch normalisation).

    Raises:
        HessianFlowError: no batch normalisation in it, or it is split already.
    """
    if is_split(model):
        raise HessianFlowError("the model's batch normalisation is split already")
    layers: dict[nn.Module, nn.Module] = {
        m: SplitBatchNorm(m, share_affine=share_affine)
        for m in model.modules()
        if isinstance(m, _BATCH_NORM)
    }
    if not layers:
        raise HessianFlowError(
            "split_batch_norm needs a model with batch normalisation, found none: train this one"
            " without splitting"
        )
    return _replace(model, layers)


def is_split(model: nn.Module) -> bool:
    """Whether :func:`split_batch_norm` has converted the model."""
    return any(isinstance(module, SplitBatchNorm) for module in unwrap(model).modules())


def merge_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of a split model with ordinary layers holding the main set, for export.

    Raises:
        HessianFlowError: the model is not split.
    """
    merged = copy.deepcopy(unwrap(model))
    return _replace(merged, {layer: layer.main for layer in _split_layers(merged)})


@contextmanager
def clean_rows(model: nn.Module, clean: int | None) -> Iterator[None]:
    """Inside, the first `clean` rows of every batch use the main set and the rest the adversarial
    one.

    Args:
        clean: number of clean rows; 0: all rows are adversarial; None: all are clean.

    Raises:
        HessianFlowError: the model is not split, or a negative number.
    """
    if clean is not None and clean < 0:
        raise HessianFlowError(f"clean must be at least 0 rows, got {clean}")
    layers = _split_layers(unwrap(model))
    before = [layer.clean for layer in layers]
    try:
        for layer in layers:
            layer.clean = clean
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.clean = value


def _split_layers(model: nn.Module) -> list[SplitBatchNorm]:
    layers = [module for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not layers:
        raise HessianFlowError(
            "the model has no split batch normalisation: convert it with split_batch_norm(model)"
        )
    return layers


def _replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    # Listed first: the tree changes on the way. A layer used twice is replaced by one and the same
    # layer.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])
    return layers.get(model, model)
