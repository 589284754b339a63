"""The gradient of the mean loss over one optimization batch, in as many microbatches as it takes.

Each microbatch counts by its examples: with n_i of n examples its mean loss enters with weight n_i / n, so that the sum
of the weights is 1 for every split, a ragged tail and a batch size that has just changed included. Where a loss divides
by something else (class weights, ignored targets), so do the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessianflow.batches import loss_weight, mean_loss, num_examples, split
from hessianflow.interfaces import AgreedError, Batch, Exposure, GradientObserver, HessianFlowError, LossFn, World
from hessianflow.training.evaluate import count_correct, weighted
from hessianflow.training.world import LocalWorld

Precision = Literal["float32", "bf16", "fp16"]


@dataclass(frozen=True)
class OwnResult:
    """What one rank's part of a batch gave, or its twins; tensors stay on the device.

    Attributes:
        loss: mean over its rows.
        weight: what that mean divides by; 0 where there is no row.
        correct: hits; None where they are not counted.
        rows: how many.
        twins: the same of adversarial twins.
    """

    loss: Tensor
    weight: float | Tensor
    correct: Tensor | None
    rows: int
    twins: "OwnResult | None" = None


@dataclass(frozen=True)
class BatchResult:
    """What one optimization batch gave over all ranks; tensors stay on the device."""

    loss: Tensor
    correct: Tensor | None
    examples: int
    trained: int
    """`examples` were drawn from the data; a transform may have made another number of them."""
    twin_loss: Tensor | None = None
    """Mean loss over adversarial twins, where there are any; `loss` and `correct` are those of the batch itself."""
    flags: tuple[bool, ...] = ()
    """What any rank raised during the step."""


@dataclass
class GradientAccumulator:
    """Puts the gradient of the mean loss into `.grad`.

    Attributes:
        model: in the mode the caller set.
        loss_fn: see :data:`hessianflow.interfaces.LossFn`.
        parameters: what is trained: gradients of these are made, and no others looked at.
        observers: shown the gradient of each microbatch and the whole.
        world: told which backward pass is the last.
        paired: a rank without rows runs the model all the same: its layers exchange statistics.
        group_size: examples that batch normalisation sees at once; microbatches of that size or more hold whole groups.
        precision: "bf16" and "fp16" run forward and loss under autocast; "fp16" scales the loss.
    """

    model: nn.Module
    loss_fn: LossFn
    parameters: Sequence[nn.Parameter]
    observers: Sequence[GradientObserver] = ()
    precision: Precision = "float32"
    group_size: int | None = None
    world: World = field(default_factory=LocalWorld)
    paired: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self._shows_inputs = True
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if dtype is None else lambda: torch.autocast(device, dtype=dtype)
        )

    def __call__(self, batch: Batch, microbatch_size: int | None = None) -> OwnResult:
        """Replace every `.grad` by the gradient of the mean loss over `batch` (times the loss scale under fp16).

        Args:
            batch: (inputs, targets), on the model's device.
            microbatch_size: most examples in one forward pass; None runs the whole batch at once.
        """
        return self.expose(Exposure(batch), microbatch_size)

    def expose(self, exposure: Exposure, microbatch_size: int | None = None) -> OwnResult:
        """Replace every `.grad` by the gradient that `exposure` asks for; rows drawn and twins never share a pass.

        Without a row there is no gradient.

        Raises:
            HessianFlowError: a gradient by the inputs is wanted and there is none.
        """
        self.clear()
        batch, twins = exposure.batch, exposure.twins
        keep = exposure.on_input_gradient if self._shows_inputs else None
        if self.paired and twins is not None:
            raise HessianFlowError("adversarial twins cannot be trained with SyncBatchNorm: use norm_batch_size")
        if num_examples(batch[1]) == 0:
            return self._nothing(batch)
        ours = loss_weight(self.loss_fn, batch[1])
        if twins is None or num_examples(twins[1]) == 0:
            return self._add(batch, ours, microbatch_size, nullcontext, keep, is_last=True)
        divisor = ours + loss_weight(self.loss_fn, twins[1]) if exposure.average else ours
        own = self._add(batch, divisor, microbatch_size, nullcontext, keep)
        return replace(own, twins=self._add(twins, divisor, microbatch_size, exposure.twin_mode, is_last=True))

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Within it gradients are shown to nobody, neither to observers nor to whoever wants those by the inputs."""
        observers, self.observers, self._shows_inputs = self.observers, (), False
        try:
            yield
        finally:
            self.observers, self._shows_inputs = observers, True

    def _nothing(self, batch: Batch) -> OwnResult:
        if self.paired:
            with self.autocast():
                outputs = self.model(batch[0])
            with self.world.last_backward(0):
                (outputs.sum() * 0).backward()
        return OwnResult(torch.zeros((), device=self.parameters[0].device), 0, None, 0)

    def share(self, own: OwnResult, flags: Sequence[bool] = ()) -> BatchResult:
        """Make every `.grad` that of the rows of all ranks, and show it to the observers.

        Raises:
            HessianFlowError: no rank has a row.
        """
        twins = own.twins or OwnResult(torch.zeros_like(own.loss), 0, None, 0)
        means = [(own.loss, own.weight), (twins.loss, twins.weight)]
        totals = self.world.finish(own.loss, own.correct, [own.rows, twins.rows, *flags], means)
        rows, twin_rows, *raised = totals.counts
        if rows == 0:
            raise AgreedError(
                f"the transform left no row of a batch of {totals.examples} examples: there is no mean loss"
            )
        (loss, weight), (twin_loss, twin_weight) = totals.means
        self._show_whole(rows + twin_rows, (weight + twin_weight) / totals.weight if twin_rows else None)
        gain = twin_loss.float() if twin_rows else None
        return BatchResult(loss.float(), totals.correct, totals.examples, rows, gain, tuple(map(bool, raised)))

    def _add(
        self,
        batch: Batch,
        divisor: float | Tensor,
        size: int | None,
        mode: Callable[[], AbstractContextManager[Any]],
        on_input_gradient: Callable[[Tensor], None] | None = None,
        *,
        is_last: bool = False,
    ) -> OwnResult:
        """Add the gradient of (sum of the losses over `batch`) / divisor; `is_last`: nothing is added after it."""
        total, done = num_examples(batch[1]), 0
        whole = loss_weight(self.loss_fn, batch[1])
        loss_sum: Tensor | None = None
        correct: Tensor | None = None
        slopes = []
        for inputs, targets in split(batch, size, self.group_size):
            leaf = None if on_input_gradient is None else inputs.detach().requires_grad_()
            with self.autocast(), mode():
                outputs = self.model(inputs if leaf is None else leaf)
                loss = mean_loss(self.loss_fn, outputs, targets)
            count, part_weight = num_examples(targets), loss_weight(self.loss_fn, targets)
            done += count
            with self.world.last_backward(divisor) if is_last and done == total else nullcontext():
                self._backward(loss, _like(part_weight / divisor, loss), count, leaf)
            weight = _like(part_weight / whole, loss)
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
        return OwnResult(loss_sum, whole, correct, total)

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
        if not self.observers:
            return
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
