"""The divisor of a gradient, and the share of the whole that each microbatch has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessianflow.losses import Weight


class Divisor:
    """The divisor of the gradients in `.grad`: the weight of all rows that count.

    For losses of torch it is known before the first forward pass. For others it is known after the
    last one; until then the number of rows stands in for it.

    Args:
        rows: the number of rows of the batch.
        ahead: the weight of the batch, where it is known.

    Attributes:
        value: the divisor, or what stands in for it.
    """

    def __init__(self, rows: int, ahead: Weight | None) -> None:
        self._sum: Weight = 0
        self._is_known = ahead is not None
        self.value: Weight = rows
        if ahead is not None:
            self.value = ahead

    def expect(self, further: Weight | None) -> None:
        """Include another batch, of weight `further` where that is known."""
        if self._is_known and further is not None:
            self.value = self.value + further

    def add(self, weight: Weight) -> None:
        """Add the weight of one microbatch."""
        if not self._is_known:
            self._sum = self._sum + weight

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide by the sum of the weights added, and rescale what is in `.grad` already."""
        if self._is_known:
            return
        factor = ratio(self.value, self._sum)
        self.value = self._sum
        self._is_known = True
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


def ratio(part: Weight, whole: Weight) -> Weight:
    """Return part / whole, and 0 where the whole is 0.

    Where both are the same object it is 1, even if that is 0: the loss of a batch in which no row
    counts is 0 without a factor.
    """
    if part is whole:
        return 1.0
    if isinstance(whole, Tensor):
        return torch.where(whole > 0, part / whole, 0.0)
    if whole == 0:
        return 0.0
    return part / whole


def in_type_of(loss: Tensor, weight: Weight) -> Weight:
    """Return the weight in the type of the loss that it multiplies."""
    if isinstance(weight, Tensor):
        return weight.to(loss.dtype)
    return weight
