"""Ghost batch normalisation: statistics over groups of a fixed number of examples, however large
the forward pass.

Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741, algorithm 1. Large
batches that are run as accumulated microbatches have it in effect (the published ABSA runs did:
groups of 128); one large pass has not, so its normalisation would change with the batch size. Here
one pass over n examples gives what passes over its groups in turn would give: the same outputs, and
the running statistics moved once per group.

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
    """A batch-normalisation layer that trains on groups; its parameters and buffers are another
    layer's own."""

    group_size: int
    is_torchs_in_evaluation = True  # an attack may run it in a faster form there

    @classmethod
    def of(cls, layer: _BatchNorm, group_size: int) -> "_Ghost":
        ghost = cls(layer.num_features)
        # parameters, buffers and hooks are the very same objects
        ghost.__dict__.update(layer.__dict__)
        ghost.group_size = group_size
        return ghost

    def forward(self, input: Tensor) -> Tensor:
        groups = num_parts(len(input), self.group_size)
        if not self.training or groups == 1:
            return super().forward(input)
        return torch.cat([super(_Ghost, self).forward(part) for part in input.tensor_split(groups)])


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """Ghost form of BatchNorm1d."""


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """Ghost form of BatchNorm2d."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """Ghost form of BatchNorm3d."""


_FORMS: Mapping[type[_BatchNorm], type[_Ghost]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


@contextmanager
def ghost_normalisation(model: nn.Module, group_size: int | None) -> Iterator[None]:
    """While active, BatchNorm layers of the model normalise groups of at most `group_size` examples
    while training.

    Names, parameters and buffers are the layers' own, so optimizers and checkpoints do not notice;
    the layers come back afterwards. Groups of one batch are as equal as can be. None changes
    nothing.
    """
    places = [
        (parent, name, layer)
        for parent in (unwrap(model).modules() if group_size is not None else ())
        # all places of a layer, also those that share it
        for name, layer in parent._modules.items()
        if isinstance(layer, _BatchNorm) and type(layer) in _FORMS
    ]
    for parent, name, layer in places:
        assert group_size is not None
        setattr(parent, name, _FORMS[type(layer)].of(layer, group_size))
    try:
        yield
    finally:
        for parent, name, layer in places:
            layer.training = getattr(parent, name).training
            setattr(parent, name, layer)
