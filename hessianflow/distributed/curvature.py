"""Curvature over the examples of all ranks, with one sum over ranks per product.

With A_r the curvature matrix of the mean loss over the n_r examples of rank r, that over all N
examples is A = sum_r (n_r / N) A_r. If the loss divides by class weights, their sums replace n_r
and N. Every rank gets bitwise the same product, and so, from the same start (same seed), the same
eigenpairs after the same number of products, provided that the ranks run on one kind of machine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples, take_rows
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.measurable import uses_batch_statistics
from hessianflow.curvature.model_operator import ModelOperator
from hessianflow.curvature.operator import Operator
from hessianflow.interfaces import (
    Batch,
    HessianFlowError,
    JudgesStatistics,
    LinearOperator,
    LossFn,
    Reducer,
)
from hessianflow.measuring import unwrap


class MeanLossOperator(LinearOperator, Protocol):
    """The curvature of a mean loss over some examples, such as a HessianOperator."""

    @property
    def loss_weight(self) -> float:
        """Return the divisor of the mean over this rank's examples."""

    def release(self) -> None:
        """Free the memory that is kept between products."""


class AllReducedOperator(Operator):
    """The curvature over the examples of all ranks, from each rank's operator over its own.

    All ranks must make it, and compute every product, together.

    Args:
        base: Operator of this rank's examples.
        reducer: Reducer of the group.
        weight: Weight of this rank; None for `base.loss_weight`, mostly the number of its examples.
            With 0 the rank has none of its own, and computes no product with `base`.

    Attributes:
        total_weight: Sum of the weights of all ranks.

    Raises:
        HessianFlowError: No rank has examples, or a rank cannot tell its weight (all ranks then
            raise). A product raises the error of the base on its own rank; the others receive nan,
            so that no rank waits for another.
    """

    def __init__(
        self, base: MeanLossOperator, reducer: Reducer, *, weight: float | None = None
    ) -> None:
        self._base = base
        self._reducer = reducer
        self.size = base.size
        self.device = base.device
        self.dtype = base.dtype
        failure: HessianFlowError | None = None
        try:
            if weight is None:
                weight = base.loss_weight
        except HessianFlowError as error:
            failure = error
            weight = math.nan  # the sum then tells all ranks
        self._weight = float(weight)
        total = reducer.sum(torch.tensor(self._weight, dtype=torch.float64))
        self.total_weight = float(total)  # the host waits once, when the operator is made
        if failure is not None:
            raise failure
        if math.isnan(self.total_weight):
            raise HessianFlowError(
                "another rank cannot measure its part of the batch; its own message says why"
            )
        if self.total_weight <= 0:
            raise HessianFlowError(
                "no rank has an example to measure the curvature on: give the probe a batch"
            )

    def release(self) -> None:
        """Free the memory that the base keeps."""
        self._base.release()

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Return the base's losses over the examples of all ranks; None if it is of no model."""
        if not isinstance(self._base, JudgesStatistics):
            return None
        losses = self._base.statistics_losses()
        if losses is None:
            return None
        running, own, weight = losses
        if self._weight == 0:
            weight = 0.0
        sums = torch.tensor([running * weight, own * weight, weight], dtype=torch.float64)
        running, own, weight = self._reducer.sum(sums).tolist()
        if weight == 0:
            return 0.0, 0.0, 0.0
        return running / weight, own / weight, weight

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Return the parameters of the base, in the order of the vectors."""
        parameters: Sequence[Tensor] = self._base.parameters  # type: ignore[attr-defined]
        return parameters

    def kept_gradient(self) -> Tensor:
        """Return the gradient over the examples of all ranks; only operators of a model have it."""
        return self._summed(lambda: self._base.kept_gradient())  # type: ignore[attr-defined]

    def _product(self, vector: Tensor) -> Tensor:
        return self._summed(lambda: self._base.matvec(vector))

    def _summed(self, own: Callable[[], Tensor]) -> Tensor:
        """Return the weighted sum over ranks of what each computes from its own examples."""
        failure: HessianFlowError | None = None
        part = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        if self._weight > 0:
            try:
                part = own() * (self._weight / self.total_weight)
            except HessianFlowError as error:
                failure = error
                part.fill_(float("nan"))
        total = self._reducer.sum(part)
        if failure is not None:
            raise failure
        return total


def shard(batch: Batch, reducer: Reducer) -> tuple[Batch, int]:
    """Return this rank's contiguous shard of a batch that all ranks hold, and its example count.

    Rank r of w gets rows n*r//w to n*(r+1)//w. If there is none, the first row is returned with the
    count 0, so that an operator can still be built on it.
    """
    examples = num_examples(batch)
    start = examples * reducer.rank // reducer.world_size
    stop = examples * (reducer.rank + 1) // reducer.world_size
    rows = slice(start, stop) if stop > start else slice(0, 1)
    own: Batch = take_rows(batch, rows, examples)
    return own, stop - start


def sharded(
    reducer: Reducer, make: Callable[..., MeanLossOperator] = HessianOperator
) -> Callable[..., Operator]:
    """Return the `operator` of a :class:`~hessianflow.curvature.CurvatureProbe` over all ranks.

    Each rank multiplies with the matrix of its shard of the probe batch, which must be the same on
    all ranks, and products are summed. If batch normalisation uses the statistics of the batch
    (`norm_mode="batch"`, or layers without running statistics), it needs the whole batch, so every
    rank measures all of it. The reducer is that of the group, or the trainer's world; `make` makes
    a rank's own operator from (model, loss_fn, batch) and options.
    """

    def operator(model: nn.Module, loss_fn: LossFn, batch: Batch, **options: Any) -> Operator:
        own = batch
        weight = None
        if not uses_batch_statistics(unwrap(model), options.get("norm_mode", "eval")):
            own, count = shard(batch, reducer)
            if count == 0:
                weight = 0
        base = make(model, loss_fn, own, **options)
        if isinstance(base, ModelOperator):
            base.is_part = num_examples(own) < num_examples(batch)
        return AllReducedOperator(base, reducer, weight=weight)

    return operator
