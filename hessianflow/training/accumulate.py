"""The gradient of the mean loss over one optimization batch, computed in microbatches.

Each microbatch is weighted by its examples: with n_i of n examples its mean loss has weight n_i /
n, so the weights sum to 1 for every split, including one with a smaller last microbatch. Where a
loss divides by something else (class weights, ignored targets), so do the weights
(:mod:`hessianflow.losses`). Where that divisor is a guess, the first batches that are cut are
checked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors, num_examples, split
from hessianflow.interfaces import (
    AgreedError,
    Batch,
    Exposure,
    GradientObserver,
    HessianFlowError,
    LossFn,
    StepResult,
    World,
)
from hessianflow.losses import BatchLoss, Forwarded, SplitCheck, Weight, exact_type, weighted
from hessianflow.losses.model_loss import logits_of
from hessianflow.training.backward import BackwardPass, Divisor
from hessianflow.training.evaluate import count_hits
from hessianflow.training.world import LocalWorld

Precision = Literal["float32", "bf16", "fp16"]


@dataclass(frozen=True)
class _Rows:
    """Rows whose losses are summed together: those of a batch, or its adversarial twins.

    Attributes:
        ahead: the divisor of their mean loss, where that is known before the forward pass.
        mode: entered around each forward pass.
        on_input_gradient: given the gradient by the inputs; None: it is not computed.
    """

    batch: Batch
    ahead: Weight | None
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    on_input_gradient: Callable[[Tensor], None] | None = None


class GradientAccumulator:
    """Puts the gradient of the mean loss into `.grad`.

    Args:
        model: in the mode the caller set.
        loss_fn: see :data:`hessianflow.interfaces.LossFn`.
        parameters: the trained parameters; no other gradients are computed.
        observers: shown the gradient of each microbatch and that of the batch.
        precision: "bf16" and "fp16" run forward and loss under autocast; "fp16" scales the loss.
        group_size: examples that batch normalisation sees at once; microbatches of that size or
            more hold whole groups.
        world: told which backward pass is the last; None: this process alone.
        paired: whether layers exchange statistics, so that a rank without rows runs the model too.

    Attributes:
        loss: the loss of a batch in any form.
        backward: the backward passes, which know parameters and observers.
        scaler: scales the loss under "fp16".
        autocast: the context of forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        parameters: Sequence[nn.Parameter],
        observers: Sequence[GradientObserver] = (),
        precision: Precision = "float32",
        group_size: int | None = None,
        world: World | None = None,
        paired: bool = False,
    ) -> None:
        self.loss_fn = loss_fn
        self.precision = precision
        self.paired = paired
        self.model = model
        self.group_size = group_size
        self.world = world or LocalWorld()
        self._device = parameters[0].device
        self._exact = exact_type(self._device)
        self.loss = BatchLoss(loss_fn)
        self._check_split = SplitCheck(self.loss.mean)
        self._shows_inputs = True
        device = self._device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        self.backward = BackwardPass(model, parameters, observers, self.world, self.scaler)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if dtype is not None:
            self.autocast = partial(torch.autocast, device, dtype=dtype)

    def __call__(self, batch: Batch, microbatch_size: int | None = None) -> StepResult:
        """Replace every `.grad` by the gradient of the mean loss over a batch on its device.

        Under fp16 it is multiplied by the loss scale. Each forward pass has at most
        `microbatch_size` examples; with None the whole batch is one pass. A loss that cannot be cut
        into microbatches is refused.
        """
        own = self.expose(Exposure(batch), microbatch_size)
        if own.failure is not None:
            raise own.failure
        return own

    def expose(self, exposure: Exposure, microbatch_size: int | None = None) -> StepResult:
        """Replace every `.grad` by the gradient that `exposure` asks for; without rows, by None.

        Rows drawn and their twins never share a forward pass. A loss without the gradient by the
        inputs is refused where that is wanted.
        """
        self.backward.clear()
        if self.paired and exposure.twins is not None:
            raise HessianFlowError(
                "adversarial twins cannot be trained with SyncBatchNorm: use norm_batch_size"
            )
        count = num_examples(exposure.batch)
        if count == 0:
            return self._nothing(exposure.batch)
        ahead = self.loss.weight_ahead(exposure.batch)
        keep = exposure.on_input_gradient
        if not self._shows_inputs:
            keep = None
        rows = _Rows(exposure.batch, ahead, on_input_gradient=keep)
        divisor = Divisor(count, ahead)
        if exposure.twins is None or num_examples(exposure.twins) == 0:
            return self._add(rows, divisor, microbatch_size, settles=True, is_last=True)
        return self._add_both(rows, exposure, divisor, microbatch_size)

    def _add_both(
        self, rows: _Rows, exposure: Exposure, divisor: Divisor, size: int | None
    ) -> StepResult:
        """Add the gradients of the rows drawn, and then those of their twins."""
        assert exposure.twins is not None
        ahead = self.loss.weight_ahead(exposure.twins)
        twins = _Rows(exposure.twins, ahead, exposure.twin_mode)
        if exposure.average:
            # Rows and twins then have one mean, whose divisor is complete only after the twins.
            divisor.expect(ahead)
        own = self._add(rows, divisor, size, settles=not exposure.average)
        of_twins = self._add(twins, divisor, size, settles=True, is_last=True)
        failure = own.failure or of_twins.failure
        return replace(own, twins=of_twins, divisor=divisor.value, failure=failure)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Show gradients neither to observers nor, by the inputs, to the exposure while active."""
        observers = self.backward.observers
        self.backward.observers = ()
        self._shows_inputs = False
        try:
            yield
        finally:
            self.backward.observers = observers
            self._shows_inputs = True

    def _nothing(self, batch: Batch) -> StepResult:
        if self.paired:  # The other ranks' layers wait for the statistics of this one.
            with self.autocast():
                if self.loss.takes_pair(batch):
                    value = logits_of(self.model(batch[0])).sum()
                else:
                    # The mean over no row is 0 / 0.
                    value = self.loss(self.model, batch).averaged.value.nan_to_num()
            with self.world.last_backward(0):
                (value * 0).backward()
        return StepResult(torch.zeros((), dtype=self._exact, device=self._device), 0)

    def reduce_over_ranks(self, own: StepResult) -> StepResult:
        """Turn every `.grad` into that of the rows of all ranks, and show it to the observers.

        All ranks refuse a batch without rows, and a loss that cannot be cut into microbatches.
        """
        result = self.world.finish(own)
        if result.failure is not None:
            raise result.failure  # All ranks have heard of it, so that none waits for another.
        if result.rows == 0:
            raise AgreedError(
                f"the transform left no row of a batch of {result.examples} examples: there is no"
                " mean loss"
            )
        twins = result.twins
        if twins is None:
            self.backward.show_whole(result.rows)
        else:
            factor = (result.weight + twins.weight) / result.divisor
            self.backward.show_whole(result.rows + twins.rows, factor)
        return result

    def _add(
        self,
        rows: _Rows,
        divisor: Divisor,
        size: int | None,
        *,
        settles: bool,
        is_last: bool = False,
    ) -> StepResult:
        """Add the gradient of (sum of the losses of `rows`) / divisor, at most `size` rows a pass.

        The divisor is told the weight of every microbatch. After these rows it is complete if
        `settles`, and the gradient of the step is if `is_last`.
        """
        total = num_examples(rows.batch)
        done = 0
        result: StepResult | None = None
        slopes: list[Tensor | None] = []
        for piece in split(rows.batch, size, self.group_size):
            passed = piece
            leaf: Tensor | None = None
            if rows.on_input_gradient is not None:
                leaf = piece[0].detach().requires_grad_()
                passed = leaf, piece[1]
            count = num_examples(piece)
            is_cut = count < total
            done += count
            ends = done == total
            ahead = rows.ahead
            if is_cut:
                ahead = None  # The weight known ahead is that of all rows together.
            with self.autocast(), rows.mode():
                forwarded = self.loss(self.model, passed, ahead)
                failure = self._split_failure(forwarded, is_cut)
            averaged = forwarded.averaged
            divisor.add(averaged.weight)
            if settles and ends:
                # Before the last backward pass, which may send gradients to the other ranks.
                divisor.settle(self.backward.parameters)
            self.backward(averaged, divisor.value, count, leaf, last=is_last and ends)
            part = self._result(forwarded, count, failure)
            if result is not None:
                part = result + part
            result = part
            if leaf is not None:
                slopes.append(leaf.grad)
        assert result is not None
        if rows.on_input_gradient is not None:
            rows.on_input_gradient(_joined(slopes))
        return result

    def _result(
        self, forwarded: Forwarded, count: int, failure: HessianFlowError | None
    ) -> StepResult:
        """Return the loss and hits of one microbatch.

        The sum is taken in a wider type, so that the mean does not depend on the split.
        """
        averaged = forwarded.averaged
        weight = averaged.weight
        total = weighted(averaged.value.detach().to(self._exact), weight)
        outputs, targets = forwarded.arguments
        hits = count_hits(map_tensors(Tensor.detach, outputs), targets, averaged)
        return StepResult(total, weight, hits, count, count, weight, None, failure)

    def _split_failure(self, forwarded: Forwarded, is_cut: bool) -> HessianFlowError | None:
        """Return why the loss cannot be cut into microbatches; None: it can, or is not cut."""
        if not is_cut and self.world.world_size == 1:
            return None
        try:
            self._check_split(*forwarded.arguments)
        except HessianFlowError as error:
            return error  # Not raised here: the ranks raise it together after the step.
        return None


def _joined(slopes: Sequence[Tensor | None]) -> Tensor:
    """Return the gradients by the inputs of all microbatches as one tensor; refuse to find none."""
    present = [slope for slope in slopes if slope is not None]
    if not present:
        raise HessianFlowError(
            "the loss does not depend on the inputs: there is no gradient by them to keep"
        )
    return torch.cat(present)
