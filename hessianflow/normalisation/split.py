"""Split batch normalisation: one set of statistics for clean examples, one for adversarial ones.

Xie et al., "Adversarial examples improve image recognition" (AdvProp), arXiv 1911.09665; used by
ConAdv, arXiv 2106.00221. With one set of statistics for both, the running ones become a mixture and
clean accuracy falls.

A batch is one concatenation with the clean rows first. Each layer splits it where
:func:`clean_rows` says, so that a step is one forward and one backward pass, also under
DistributedDataParallel. Everything else, evaluation and export included, uses the main set.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap


class SplitBatchNorm(nn.Module):
    """A main and an adversarial batch normalisation in one layer.

    Attributes:
        main: the converted layer itself, so that an optimizer keeps its parameters.
        adversarial: a copy of that layer, with its own or the same affine parameters.
        clean: number of leading rows that `main` normalises, while `adversarial` normalises the
            rest; None leaves all to `main`. Set it through :func:`clean_rows`.
    """

    def __init__(self, main: _BatchNorm, *, share_affine: bool) -> None:
        super().__init__()
        self.main = main
        self.adversarial = copy.deepcopy(main)
        if share_affine:
            self.adversarial.weight = main.weight
            self.adversarial.bias = main.bias
        self.clean: int | None = None
        self.train(main.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the first `clean` rows by the main set, the rest by the adversarial one."""
        output: Tensor
        if self.clean is None or self.clean >= len(x):
            output = self.main(x)
        elif self.clean == 0:
            output = self.adversarial(x)
        else:
            output = torch.cat([self.main(x[: self.clean]), self.adversarial(x[self.clean :])])
        return output


def split_batch_norm(model: nn.Module, *, share_affine: bool = False) -> nn.Module:
    """Give every batch normalisation of a model a second, adversarial set.

    The layers are replaced in place; make the optimizer afterwards, or add the new parameters to
    it, unless the affine ones are shared.

    Args:
        model: any module with batch normalisation.
        share_affine: use one scale and shift for both sets (statistics are always separate). The
            default, False, is that of AdvProp.

    Returns:
        The model (a new layer if it was itself a batch normalisation).

    Raises:
        HessianFlowError: the model has no batch normalisation, or it is split already.
    """
    if is_split(model):
        raise HessianFlowError("the model's batch normalisation is split already")
    layers: dict[nn.Module, nn.Module] = {
        m: SplitBatchNorm(m, share_affine=share_affine)
        for m in model.modules()
        if isinstance(m, _BatchNorm)
    }
    if not layers:
        raise HessianFlowError(
            "split_batch_norm needs a model with batch normalisation, found none: train this one"
            " without splitting"
        )
    return _replace(model, layers)


def is_split(model: nn.Module) -> bool:
    """Return whether :func:`split_batch_norm` has converted the model."""
    return any(isinstance(module, SplitBatchNorm) for module in unwrap(model).modules())


def merge_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a split model for export, with ordinary layers that hold the main set.

    Raises:
        HessianFlowError: the model is not split.
    """
    merged = copy.deepcopy(unwrap(model))
    return _replace(merged, {layer: layer.main for layer in _split_layers(merged)})


@contextmanager
def clean_rows(model: nn.Module, clean: int | None) -> Iterator[None]:
    """Normalise the first `clean` rows of every batch by the main set, others by the adversarial.

    With 0 all rows are adversarial, with None all are clean.

    Raises:
        HessianFlowError: the model is not split, or the number is negative.
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
    # The modules are listed first, because the tree changes on the way. A layer that is used twice
    # is replaced by the same new layer.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])
    return layers.get(model, model)
