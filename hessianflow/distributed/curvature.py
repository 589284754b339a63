"""Curvature over the examples of all ranks: each multiplies with the matrix of its own, one sum a
product.

With A_r the curvature matrix of the mean loss over the n_r examples of rank r, that over all N
examples is A = sum_r (n_r / N) A_r, with class weights in place of numbers where the loss divides
by those. Every rank gets bitwise the same product, and so, from the same start (same seed), the
same eigenpairs after the same number of products, provided the ranks are of one kind of machine.
"""

import math
from collections.abc import Callable
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
        """What the mean over this rank's examples divides by."""
        ...

    def release(self) -> None:
        """Free what is kept between products."""
        ...


class AllReducedOperator(Operator):
    """The curvature over the examples of all ranks, from each rank's operator over its own.

    Must be made, and every product asked for, by all ranks together.

    Args:
        base: the operator of this rank's examples.
        reducer: of the group.
        weight: what this rank counts for; default `base.loss_weight`, mostly its examples. 0: the
            rank has none of its own, `base` is never asked for a product.

    Attributes:
        total_weight: over all ranks.

    Raises:
        HessianFlowError: no examples on any rank; on all together, a part whose weight cannot be
            told. At a product, what the base raises, on the rank that raises it; the others receive
            nan, so that no rank waits for another.
    """

    def __init__(
        self, base: MeanLossOperator, reducer: Reducer, *, weight: float | None = None
    ) -> None:
        self._base, self._reducer = base, reducer
        self.size, self.device, self.dtype = base.size, base.device, base.dtype
        failure: HessianFlowError | None = None
        try:
            self._weight = float(base.loss_weight if weight is None else weight)
        except HessianFlowError as error:
            failure = error
            self._weight = math.nan
        # One wait for the device, when the operator is made.
        self.total_weight = float(
            reducer.sum(torch.tensor(self._weight, dtype=torch.float64)).item()
        )
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
        """Free what the base keeps."""
        self._base.release()

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Return what the base's method of this name does, over the examples of all ranks; None
        where it has none."""
        if not isinstance(self._base, JudgesStatistics):
            return None
        found = self._base.statistics_losses()
        if found is None:
            return None
        running, own, weight = found
        if self._weight == 0:
            weight = 0.0
        sums = torch.tensor([running * weight, own * weight, weight], dtype=torch.float64)
        running, own, weight = self._reducer.sum(sums).tolist()
        return (running / weight, own / weight, weight) if weight else (0.0, 0.0, 0.0)

    def _product(self, vector: Tensor) -> Tensor:
        failure: HessianFlowError | None = None
        share = self._weight / self.total_weight
        product = torch.zeros_like(vector)
        if self._weight > 0:
            try:
                product = self._base.matvec(vector) * share
            except HessianFlowError as error:
                failure = error
                product.fill_(float("nan"))
        total = self._reducer.sum(product)
        if failure is not None:
            raise failure
        return total


def shard(batch: Batch, reducer: Reducer) -> tuple[Batch, int]:
    """Return this rank's contiguous part of a batch that all ranks hold, and its number of
    examples.

    Rank r of w gets rows n*r//w to n*(r+1)//w. Where that is none, the first row comes back with
    the count 0, so that an operator can still be built on it.
    """
    examples, rank, world_size = num_examples(batch), reducer.rank, reducer.world_size
    start, stop = examples * rank // world_size, examples * (rank + 1) // world_size
    rows = slice(start, stop) if stop > start else slice(0, 1)
    part: Batch = take_rows(batch, rows, examples)
    return part, stop - start


def sharded(
    reducer: Reducer, make: Callable[..., MeanLossOperator] = HessianOperator
) -> Callable[..., Operator]:
    """Return the `operator` of a :class:`~hessianflow.curvature.CurvatureProbe` that measures on
    all ranks at once.

    Each rank multiplies with the matrix of its part of the probe batch, which all must hold alike,
    and products are summed. Where batch normalisation uses the statistics of the batch
    (`norm_mode="batch"`, or layers without running statistics), the whole batch is needed for them,
    so every rank measures all of it.

    Args:
        reducer: of the group, or the trainer's world.
        make: makes a rank's own operator from (model, loss_fn, batch) and options.
    """

    def operator(model: nn.Module, loss_fn: LossFn, batch: Batch, **options: Any) -> Operator:
        if uses_batch_statistics(unwrap(model), options.get("norm_mode", "eval")):
            part, count = batch, 1
        else:
            part, count = shard(batch, reducer)
        base = make(model, loss_fn, part, **options)
        if isinstance(base, ModelOperator):
            base.is_part = num_examples(part) < num_examples(batch)
        return AllReducedOperator(base, reducer, weight=None if count else 0)

    return operator
