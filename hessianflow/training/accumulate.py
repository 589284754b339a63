"""The gradient of the mean loss over one optimization batch, in as many microbatches as it takes.

Each microbatch counts by its examples: with n_i of n examples its mean loss enters with weight n_i / n, so that the sum
of the weights is 1 for every split, a ragged tail and a batch size that has just changed included. Where a loss divides
by something else (class weights, ignored targets), so do the weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessianflow.batches import loss_weight, mean_loss, num_examples, split
from hessianflow.interfaces import Batch, Exposure, GradientObserver, HessianFlowError, LossFn
from hessianflow.training.evaluate import count_correct, weighted

Precision = Literal["float32", "bf16", "fp16"]


@dataclass(frozen=True)
class BatchResult:
    """What one optimization batch gave; tensors stay on the device."""

    loss: Tensor
    correct: Tensor | None
    examples: int
    trained: int
    """`examples` were drawn from the data; a transform may have made another number of them."""
    twin_loss: Tensor | None = None
    """Mean loss over adversarial twins, where there are any; `loss` and `correct` are those of the batch itself."""


@dataclass
class GradientAccumulator:
    """Puts the gradient of the mean loss into `.grad`.

    Attributes:
        model: in the mode the caller set.
        loss_fn: see :data:`hessianflow.interfaces.LossFn`.
        parameters: what is trained: gradients of these are made, and no others looked at.
        observers: shown the gradient of each microbatch and the whole.
        group_size: examples that batch normalisation sees at once; microbatches of that size or more hold whole groups.
        precision: "bf16" and "fp16" run forward and loss under autocast; "fp16" scales the loss.
    """

    model: nn.Module
    loss_fn: LossFn
    parameters: Sequence[nn.Parameter]
    observers: Sequence[GradientObserver] = ()
    precision: Precision = "float32"
    group_size: int | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if dtype is None else lambda: torch.autocast(device, dtype=dtype)
        )

    def __call__(self, batch: Batch, microbatch_size: int | None = None) -> BatchResult:
        """Replace every `.grad` by the gradient of the mean loss over `batch` (times the loss scale under fp16).

        Args:
            batch: (inputs, targets), on the model's device.
            microbatch_size: most examples in one forward pass; None runs the whole batch at once.

        Raises:
            HessianFlowError: the batch is empty.
        """
        return self.expose(Exposure(batch), microbatch_size)

    def expose(self, exposure: Exposure, microbatch_size: int | None = None) -> BatchResult:
        """Replace every `.grad` by the gradient that `exposure` asks for; rows drawn and twins never share a pass.

        Raises:
            HessianFlowError: the batch is empty; a gradient by the inputs is wanted and there is none.
        """
        total = num_examples(exposure.batch[1])
        if total == 0:
            raise HessianFlowError("a batch of 0 examples has no mean loss: check the training data")
        self.clear()
        if exposure.twins is None:
            loss, correct = self._add(exposure.batch, 1.0, microbatch_size, nullcontext, exposure.on_input_gradient)
            if self.observers:
                self._show_whole(total)
            return BatchResult(loss, correct, total, total)
        ours, theirs = loss_weight(self.loss_fn, exposure.batch[1]), loss_weight(self.loss_fn, exposure.twins[1])
        divisor = ours + theirs if exposure.average else ours
        loss, correct = self._add(
            exposure.batch, ours / divisor, microbatch_size, nullcontext, exposure.on_input_gradient
        )
        twin_loss, _ = self._add(exposure.twins, theirs / divisor, microbatch_size, exposure.twin_mode)
        if self.observers:
            self._show_whole(total + num_examples(exposure.twins[1]), (ours + theirs) / divisor)
        return BatchResult(loss, correct, total, total, twin_loss)

    def _add(
        self,
        batch: Batch,
        factor: float | Tensor,
        size: int | None,
        mode: Callable[[], AbstractContextManager[Any]],
        on_input_gradient: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Add `factor` times the gradient of the mean loss over `batch`; its mean loss and number of hits."""
        whole = loss_weight(self.loss_fn, batch[1])
        loss_sum: Tensor | None = None
        correct: Tensor | None = None
        slopes = []
        for inputs, targets in split(batch, size, self.group_size):
            leaf = None if on_input_gradient is None else inputs.detach().requires_grad_()
            with self.autocast(), mode():
                outputs = self.model(inputs if leaf is None else leaf)
                loss = mean_loss(self.loss_fn, outputs, targets)
            weight = loss_weight(self.loss_fn, targets) / whole
            self._backward(loss, _like(weight * factor, loss), num_examples(targets), leaf)
            weight = _like(weight, loss)
            slopes.append(None if leaf is None else leaf.grad)
            part = weighted(loss.detach().float(), weight)
            loss_sum = part if loss_sum is None else loss_sum + part
            hits = count_correct(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets)
            correct = hits if correct is None or hits is None else correct + hits
        assert loss_sum is not None
        if on_input_gradient is not None:
            found = [slope for slope in slopes if slope is not None]
            if not found:
                raise HessianFlowError("the loss does not depend on the inputs: there is no gradient by them to keep")
            on_input_gradient(torch.cat(found))
        return loss_sum, correct

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def _backward(self, loss: Tensor, weight: float | Tensor, count: int, leaf: Tensor | None = None) -> None:
        if not self.observers:
            self.scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
            return
        scaled = self.scaler.scale(loss)
        wanted = [*self.parameters, *([] if leaf is None else [leaf])]
        found: Sequence[Tensor | None] = torch.autograd.grad(scaled, wanted, allow_unused=True)
        gradients = found[: len(self.parameters)]
        if leaf is not None:
            leaf.grad = found[-1]
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        for observer in self.observers:
            observer.on_microbatch(self._unscaled(filled), count)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            part = gradient * weight
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)

    def _show_whole(self, total: int, factor: float | Tensor | None = None) -> None:
        """Show the gradient of the mean loss over all rows; `.grad` holds `factor` times that (None: once)."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if factor is not None:
            gradients = [gradient / factor for gradient in gradients]
        for observer in self.observers:
            observer.on_step(self._unscaled(gradients), total)

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        # Waits for the device, but only under fp16 with observers: the scale lives there.
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        return gradients if scale == 1.0 else list(torch._foreach_div(gradients, scale))


def _like(weight: float | Tensor, loss: Tensor) -> float | Tensor:
    return weight.to(loss.dtype) if isinstance(weight, Tensor) else weight
