"""A check that a loss repeats: a random operator is no matrix, but its products would look so."""

import torch
from torch import Tensor

from hessianflow.curvature.staleness import Snapshot
from hessianflow.interfaces import HessianFlowError


class RepeatCheck:
    """Compares each loss with the last one at the same weights and the same batch.

    All products draw the same random numbers, because measuring restores the generators and a kept
    graph keeps its own numbers. Only a second pass within one product shows that a loss is random:
    `wanted` says whether the first one makes it. Losses may differ by the square root of the
    resolution of `dtype`, the type of the vectors.
    """

    def __init__(self, wanted: bool, dtype: torch.dtype) -> None:
        self._wanted = wanted
        self._tolerance = torch.finfo(dtype).eps ** 0.5
        self._last: tuple[Snapshot, float] | None = None

    def is_due(self) -> bool:
        """Return whether to make the second pass now; True at most once."""
        is_due = self._wanted
        self._wanted = False
        return is_due

    def compare(self, snapshot: Snapshot, loss: Tensor) -> None:
        """Raise HessianFlowError if a loss differs from the last one, computed from the same
        values.
        """
        value = float(loss)  # one number from the device for each graph that is built
        if self._last is not None and self._last[0].has_values_of(snapshot):
            before = self._last[1]
            if abs(value - before) > self._tolerance * max(abs(value), abs(before)):
                raise HessianFlowError(
                    f"the loss changed from {before:.6g} to {value:.6g} between two products at the"
                    " same weights; switch off dropout and random augmentation in the data or in"
                    " the model's forward"
                )
        self._last = (snapshot, value)

    def forget(self) -> None:
        """Forget the last loss, so that the next one is compared with nothing."""
        self._last = None
