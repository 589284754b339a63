"""Ghost batch normalisation: statistics over groups of a fixed number of examples.

Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, algorithm 1. Large
batches that are run as accumulated microbatches are normalised in such groups (of 128 in the
published ABSA runs); in one large pass normalisation would change with the batch size. Here one
pass over n examples has the result of passes over its groups in turn: the same outputs, and running
statistics that move once per group.

Deviation from algorithm 1: the running statistics are moved group by group, as accumulation does,
instead of by a closed formula; the result is the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessianflow.batches import num_parts
from hessianflow.measuring import unwrap


class _Ghost(_BatchNorm):
    """A layer that trains on groups and shares parameters and buffers with the original layer."""

    group_size: int
    is_torchs_in_evaluation = True  # so an attack may run it in a faster form

    @classmethod
    def of(cls, layer: _BatchNorm, group_size: int) -> "_Ghost":
        ghost = cls(layer.num_features)
        # Parameters, buffers and hooks are the same objects.
        ghost.__dict__.update(layer.__dict__)
        ghost.group_size = group_size
        return ghost

    def forward(self, input: Tensor) -> Tensor:
        groups = num_parts(len(input), self.group_size)
        if not self.training or groups == 1:
            return super().forward(input)
        pieces = input.tensor_split(groups)
        return torch.cat([super(_Ghost, self).forward(piece) for piece in pieces])


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """The ghost form of BatchNorm1d."""


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """The ghost form of BatchNorm2d."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """The ghost form of BatchNorm3d."""


_FORMS: Mapping[type[_BatchNorm], type[_Ghost]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


@contextmanager
def ghost_normalisation(model: nn.Module, group_size: int | None) -> Iterator[None]:
    """Normalise groups of at most `group_size` examples in training, in all BatchNorm layers.

    The layers are put back afterwards; names, parameters and buffers stay their own, so optimizers
    and checkpoints see no change. Groups of one batch are as equal as possible. None changes
    nothing.
    """
    if group_size is None:
        yield
        return
    # A layer is listed for each parent that holds it.
    uses = [
        (parent, name, layer)
        for parent in unwrap(model).modules()
        for name, layer in parent._modules.items()
        if isinstance(layer, _BatchNorm) and type(layer) in _FORMS
    ]
    for parent, name, layer in uses:
        setattr(parent, name, _FORMS[type(layer)].of(layer, group_size))
    try:
        yield
    finally:
        for parent, name, layer in uses:
            layer.training = getattr(parent, name).training
            setattr(parent, name, layer)
