"""What a gradient is divided by, and which share of the whole each microbatch has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessianflow.losses import Weight


class Divisor:
    """What the gradients in `.grad` are divided by: the weight of all rows that count.

    It is known ahead for losses of torch. For others it is known when the last part has been
    forwarded; until then the number of rows stands in for it.

    Args:
        rows: the number of rows of the batch.
        ahead: the weight of the batch, where it is known.

    Attributes:
        value: the divisor, or what stands in for it.
    """

    def __init__(self, rows: int, ahead: Weight | None) -> None:
        self._sum: Weight = 0
        self._is_known = ahead is not None
        self.value: Weight = rows if ahead is None else ahead

    def expect(self, further: Weight | None) -> None:
        """Sum up another batch, too, of this weight, where it is known."""
        if self._is_known and further is not None:
            self.value = self.value + further

    def add(self, weight: Weight) -> None:
        """Count one part."""
        if not self._is_known:
            self._sum = self._sum + weight

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide by the weight of all parts, which have been counted now.

        What is in `.grad` already is rescaled.
        """
        if self._is_known:
            return
        factor = ratio(self.value, self._sum)
        self.value = self._sum
        self._is_known = True
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


def ratio(part: Weight, whole: Weight) -> Weight:
    """Return part / whole, and 0 for a part of nothing.

    Where both are the very same it is 1, even of nothing: such a loss counts for nothing by itself.
    """
    if part is whole:
        return 1.0
    if isinstance(whole, Tensor):
        return torch.where(whole > 0, part / whole, 0.0)
    return part / whole if whole != 0 else 0.0


def in_type_of(loss: Tensor, weight: Weight) -> Weight:
    """Return the weight in the type of the loss that it multiplies."""
    return weight.to(loss.dtype) if isinstance(weight, Tensor) else weight
