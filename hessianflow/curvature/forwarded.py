"""The data of an operator, as the pieces that its model is run on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hessianflow.batches import map_tensors, num_examples, split, to_device
from hessianflow.curvature.cut_check import check_cut
from hessianflow.curvature.selection import batches_of, checked_batches, single_batch
from hessianflow.curvature.vectors import usable_in_graph
from hessianflow.losses import BatchLoss


class ForwardedData:
    """The batches of an operator, cut into pieces of at most `microbatch_size` examples.

    `data` are one batch or a re-iterable of batches (HessianFlowError if they are neither or none),
    and `loss` knows the weight of most pieces from their targets. The attribute `single` is the
    only batch, where that can be told without reading a data set.
    """

    def __init__(
        self, data: Any, microbatch_size: int | None, device: torch.device, loss: BatchLoss
    ) -> None:
        self._batches = batches_of(data)
        self.single = single_batch(self._batches)
        self._microbatch_size = microbatch_size
        self._device = device
        self._loss = loss
        self._is_cut_checked = False

    @property
    def is_one_piece(self) -> bool:
        """Return whether the data are a single batch that is run at once."""
        return self.single is not None and self._fits(self.single)

    def num_examples(self) -> int:
        """Return the number of examples; reads the data once."""
        return sum(num_examples(batch) for batch in checked_batches(self._batches))

    def pieces(self, model: nn.Module | None = None) -> Iterator[Any]:
        """Yield the pieces on the device, without those of weight 0, whose targets are all ignored.

        If `model` is given, the first batch that is cut is checked with it.
        """
        for batch in checked_batches(self._batches):
            if model is not None and not self._is_cut_checked and not self._fits(batch):
                self._is_cut_checked = True
                if self._loss.takes_pair(batch):
                    check_cut(model, batch, self._local)
            for piece in split(batch, self._microbatch_size):
                local = self._local(piece)
                if self.weight_ahead(local) != 0:
                    yield local

    def weight_ahead(self, batch: Any) -> float | None:
        """Return the weight of a batch if its targets tell it, else None."""
        weight = self._loss.weight_ahead(batch)
        if weight is None:
            return None
        # The host waits for a weight on the device: a piece of weight 0 must not be forwarded.
        return float(weight)

    def _fits(self, batch: Any) -> bool:
        return self._microbatch_size is None or num_examples(batch) <= self._microbatch_size

    def _local(self, batch: Any) -> Any:
        moved = to_device(batch, self._device, non_blocking=True)
        return map_tensors(usable_in_graph, moved)
