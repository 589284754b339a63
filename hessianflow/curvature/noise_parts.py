"""The gradients of parts of some data, and their products with the Hessians of other parts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.noise_ratio import PartProducts
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.interfaces import HessianFlowError

LEAST_PARTS = 4
"""Fewest parts: each needs two others to compare, and an error needs some to spare."""

REPEATS = 1e-3
"""Relative difference between the squared lengths of a part's gradient in two passes, above which
they count as those of different examples. Our choice, far above rounding."""

CHANGED = (
    "the gradients changed between two passes over the data: pass a list of batches, or a loader"
    " that neither shuffles nor augments"
)

Form = Literal["product", "simple"]
"""Whether products with the Hessian are taken."""


class TooFewPartsError(HessianFlowError):
    """The data give fewer independent gradients than an error bar needs."""


class Ring:
    """The parts in their order, of which the last is followed by the first.

    Args:
        whole: operator on all data, whose checks the operators of the parts share.
        parts: returns the batches; called twice.
        update: function that makes an update of a flat gradient.
        form: see noise_scale.

    Attributes:
        examples: examples in all parts, once they were read.
        weight: weight of all parts, once they were read.
    """

    def __init__(
        self,
        whole: HessianOperator,
        parts: Callable[[], Iterable[Any]],
        update: Callable[[Tensor], Tensor],
        form: Form,
    ) -> None:
        self._whole = whole
        self._form = form
        self._parts = parts
        self._update = update
        self.examples = 0
        self._weights: list[float] = []
        self._squares: list[Tensor] = []

    @property
    def weight(self) -> float:
        """Return the weight of all parts that were read."""
        return sum(self._weights)

    def products(self) -> tuple[PartProducts, PartProducts]:
        """Return the products of all parts, with the Hessian and without."""
        total, last = self._first_pass()
        weights = torch.tensor([w for w in self._weights if w > 0], dtype=torch.float64)
        if len(weights) < LEAST_PARTS:
            raise TooFewPartsError(
                f"the noise scale needs at least {LEAST_PARTS} parts with targets that count, got"
                f" {len(weights)}: pass more examples, or cut them into more parts"
            )
        rows = list(self._second_pass(total, last, weights.tolist()))
        if len(rows) != len(weights):
            raise HessianFlowError(CHANGED)
        # The host waits for the device here, once in all.
        numbers = torch.cat([torch.stack(rows), torch.stack(self._squares)[:, None]], dim=1)
        numbers = self._whole.over_ranks(numbers)
        squared = float(self._whole.over_ranks(total @ total).cpu()) / self.weight**2
        return _products(numbers.cpu().double(), weights, squared)

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        """Note weights and squares; return the weighted sum of all updates, and the last one."""
        total = torch.zeros(self._whole.size, dtype=self._whole.dtype, device=self._whole.device)
        update = total
        for batch in self._parts():
            part = self._whole.on([batch])
            self.examples += part.num_examples
            weighted, weight = part.weighted_gradient()
            self._weights.append(weight)
            if weight > 0:
                update = self._update(weighted.div_(weight))
                total.add_(update, alpha=weight)
                self._squares.append(update @ update)
        return total, update

    def _second_pass(
        self, total: Tensor, before: Tensor, weights: Sequence[float]
    ) -> Iterator[Tensor]:
        """Yield the numbers of each part that counts, shape [6].

        They are d.H d, d.H m and m.H m, then |e|^2 and e.U for the deviation e of the part's own
        update from the others' mean, and the square of that update.
        """
        whole = sum(weights)
        counting = (b for b, w in zip(self._parts(), self._weights, strict=False) if w > 0)
        for index, (batch, own) in enumerate(zip(counting, weights, strict=False)):
            operator = self._whole.on([batch])
            update = self._update(operator.gradient())
            mean = (total - own * update).div_(whole - own)
            apart = update - mean
            simple = [apart @ apart, apart @ total / whole, update @ update]
            del apart
            # The mean of all but two, from that of all but one.
            share = weights[index - 1] / (whole - own)
            deviation = (before - mean).div_(1 - share)
            bent = self._bent(operator, deviation, mean)
            del deviation
            row = torch.stack([*bent, *simple])
            operator.release()  # a graph refers to its operator, so it would wait for a collection
            yield row
            before = update

    def _bent(self, operator: ModelOperator, deviation: Tensor, mean: Tensor) -> list[Tensor]:
        """Return d.H d, d.H m and m.H m; zeros in the form without products."""
        if self._form == "simple":
            return [torch.zeros_like(mean[:1].sum())] * 3
        product = operator.matvec(deviation)
        bent = [deviation @ product, mean @ product]
        del product
        return [*bent, mean @ operator.matvec(mean)]


def _products(
    numbers: Tensor, weights: Tensor, squared: float
) -> tuple[PartProducts, PartProducts]:
    """Return the products with the Hessian and without.

    Args:
        numbers: what the second pass yields, then the squares of the first, shape [parts, 7].
        weights: weights of the parts.
        squared: the square of the mean update.

    Raises:
        NonFiniteError: A number is not finite.
        HessianFlowError: The squares of the two passes differ.
    """
    noise, both, signal, apart, along, again, before = numbers.unbind(1)
    if not bool(torch.isfinite(numbers).all()):
        raise NonFiniteError(
            "a gradient, an update or a product is not finite; look at the weights and inputs"
        )
    if not torch.allclose(before, again, rtol=REPEATS, atol=0.0):
        raise HessianFlowError(CHANGED)
    others = weights.sum() - weights
    gradients = weights.roll(1)
    with_curvature = PartProducts(
        weights=weights,
        noise_weights=gradients,
        noise=noise,
        noise_variances=1 / gradients + 1 / (others - gradients),
        signal=signal,
        signal_variances=1 / others,
        both=both,
    )
    ones = torch.ones_like(weights)
    simple = PartProducts(
        weights=ones,
        noise_weights=weights,
        noise=apart,
        noise_variances=1 / weights + 1 / others,
        signal=squared * ones,
        signal_variances=ones / weights.sum(),
        both=along,
    )
    return with_curvature, simple
