"""The gradient of the mean loss over one optimization batch, in as many microbatches as it takes.

Each microbatch is weighted by its examples: with n_i of n examples its mean loss has weight n_i /
n, so the weights sum to 1 for every split, including one with a ragged tail or after a change of
the batch size. Where a loss divides by something else (class weights, ignored targets), so do the
weights (:mod:`hessianflow.losses`). Where that divisor is a guess, the first batches that are cut
are checked.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
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
    Hits,
    LossFn,
    World,
)
from hessianflow.losses import Averaged, MeanLoss, SplitCheck, Weight, weighted
from hessianflow.training.evaluate import count_hits, summed
from hessianflow.training.parameters import name_of
from hessianflow.training.world import LocalWorld

Precision = Literal["float32", "bf16", "fp16"]


@dataclass(frozen=True)
class OwnResult:
    """The result of one rank's part of a batch, or of its twins; tensors stay on the device.

    Attributes:
        loss: the mean loss over the rows.
        weight: what that mean divides by; 0 where there is no row.
        hits: how many targets were hit, and how many count; None where they are not counted.
        rows: the number of rows.
        twins: the result of the adversarial twins.
        failure: why the loss cannot be cut into parts, if it cannot.
    """

    loss: Tensor
    weight: Weight
    hits: Hits | None
    rows: int
    twins: "OwnResult | None" = None
    failure: HessianFlowError | None = None


@dataclass(frozen=True)
class BatchResult:
    """The result of one optimization batch over all ranks; tensors stay on the device.

    Attributes:
        loss: the mean loss over the rows.
        weight: what that mean divides by; 0 where nothing counts.
        hits: how many targets were hit, and how many count; None where they are not counted.
        examples: the number of examples drawn from the data.
        trained: the number of rows trained; a transform may have changed it.
        twin_loss: the mean loss over adversarial twins, where there are any; `loss` and `hits` are
            those of the batch itself.
        flags: for each flag, whether any rank raised it during the step.
    """

    loss: Tensor
    weight: Weight
    hits: Hits | None
    examples: int
    trained: int
    twin_loss: Tensor | None = None
    flags: tuple[bool, ...] = ()


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
        group_size: examples that batch normalisation sees at once; microbatches of that size or
            more hold whole groups.
        precision: "bf16" and "fp16" run forward and loss under autocast; "fp16" scales the loss.
        create_graph: gradients can be differentiated again.
    """

    model: nn.Module
    loss_fn: LossFn
    parameters: Sequence[nn.Parameter]
    observers: Sequence[GradientObserver] = ()
    precision: Precision = "float32"
    group_size: int | None = None
    world: World = field(default_factory=LocalWorld)
    paired: bool = False
    create_graph: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self._shows_inputs = True
        self._loss = MeanLoss(self.loss_fn)
        self._check_split = SplitCheck(self._loss)
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if dtype is None else lambda: torch.autocast(device, dtype=dtype)
        )

    def __call__(self, batch: Batch, microbatch_size: int | None = None) -> OwnResult:
        """Replace every `.grad` by the gradient of the mean loss over `batch` (times the loss scale
        under fp16).

        Args:
            batch: (inputs, targets), on the model's device.
            microbatch_size: most examples in one forward pass; None runs the whole batch at once.

        Raises:
            HessianFlowError: the loss cannot be cut into microbatches.
        """
        own = self.expose(Exposure(batch), microbatch_size)
        if own.failure is not None:
            raise own.failure
        return own

    def expose(self, exposure: Exposure, microbatch_size: int | None = None) -> OwnResult:
        """Replace every `.grad` by the gradient that `exposure` asks for; rows drawn and twins
        never share a pass.

        Without a row there is no gradient.

        Raises:
            HessianFlowError: a gradient by the inputs is wanted and there is none.
        """
        self.clear()
        batch, twins = exposure.batch, exposure.twins
        keep = exposure.on_input_gradient if self._shows_inputs else None
        if self.paired and twins is not None:
            raise HessianFlowError(
                "adversarial twins cannot be trained with SyncBatchNorm: use norm_batch_size"
            )
        if num_examples(batch[1]) == 0:
            return self._nothing(batch)
        if twins is not None and num_examples(twins[1]) == 0:
            twins = None
        ahead = self._loss.weight_ahead(batch[1])
        divisor = _Divisor(num_examples(batch[1]), ahead)
        if twins is None:
            return self._add(
                batch,
                ahead,
                divisor,
                microbatch_size,
                nullcontext,
                keep,
                settles=True,
                is_last=True,
            )
        of_twins_ahead = self._loss.weight_ahead(twins[1])
        if exposure.average:
            divisor.expect(of_twins_ahead)
        own = self._add(
            batch, ahead, divisor, microbatch_size, nullcontext, keep, settles=not exposure.average
        )
        of_twins = self._add(
            twins,
            of_twins_ahead,
            divisor,
            microbatch_size,
            exposure.twin_mode,
            settles=True,
            is_last=True,
        )
        return replace(own, twins=of_twins, failure=own.failure or of_twins.failure)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Show gradients to nobody while active: not to observers, nor to those who want gradients
        by the inputs."""
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
        counts = [own.rows, twins.rows, own.failure is not None, *flags]
        totals = self.world.finish(own.loss, own.hits, counts, means)
        rows, twin_rows, failures, *raised = totals.counts
        if failures:
            raise own.failure or AgreedError(
                "another rank refuses the loss: it cannot be cut into parts"
            )
        if rows == 0:
            raise AgreedError(
                f"the transform left no row of a batch of {totals.examples} examples: there is no"
                " mean loss"
            )
        (loss, weight), (twin_loss, twin_weight) = totals.means
        self._show_whole(
            rows + twin_rows, (weight + twin_weight) / totals.weight if twin_rows else None
        )
        gain = twin_loss.float() if twin_rows else None
        return BatchResult(
            loss.float(), weight, totals.hits, totals.examples, rows, gain, tuple(map(bool, raised))
        )

    def _add(
        self,
        batch: Batch,
        ahead: Weight | None,
        divisor: "_Divisor",
        size: int | None,
        mode: Callable[[], AbstractContextManager[Any]],
        on_input_gradient: Callable[[Tensor], None] | None = None,
        *,
        settles: bool,
        is_last: bool = False,
    ) -> OwnResult:
        """Add the gradient of (sum of the losses over `batch`) / divisor.

        Args:
            ahead: the weight of the batch, where it is known.
            settles: with the last part of this batch all that the divisor sums up has been seen.
            is_last: nothing is added after it.
        """
        total = num_examples(batch[1])
        done = 0
        parts: list[tuple[Tensor, Weight]] = []
        hits: list[Hits | None] = []
        slopes = []
        failure: HessianFlowError | None = None
        for inputs, targets in split(batch, size, self.group_size):
            leaf = None if on_input_gradient is None else inputs.detach().requires_grad_()
            count = num_examples(targets)
            done += count
            with self.autocast(), mode():
                outputs = self.model(inputs if leaf is None else leaf)
                averaged = self._loss(outputs, targets, ahead if count == total else None)
                if count < total or self.world.world_size > 1:
                    failure = failure or self._split_failure(outputs, targets)
            divisor.add(averaged.weight)
            if settles and done == total:
                divisor.settle(self.parameters)
            self._backward(averaged, divisor.value, count, leaf, last=is_last and done == total)
            parts.append((averaged.value.detach().float(), averaged.weight))
            slopes.append(None if leaf is None else leaf.grad)
            hits.append(count_hits(map_tensors(Tensor.detach, outputs), targets, averaged))
        if on_input_gradient is not None:
            found = [slope for slope in slopes if slope is not None]
            if not found:
                raise HessianFlowError(
                    "the loss does not depend on the inputs: there is no gradient by them to keep"
                )
            on_input_gradient(torch.cat(found))
        weight = parts[0][1] if len(parts) == 1 else ahead
        if weight is None:
            weight = sum(weight for _, weight in parts)
        loss: Tensor = sum(_share_of_mean(loss, part, weight) for loss, part in parts)  # type: ignore[assignment]
        return OwnResult(loss, weight, summed(hits), total, None, failure)

    def _be_zero(self) -> None:
        """Set the gradient to 0 where no part of a batch gave one, because nothing counts in it.

        So it is for losses of torch, too: momentum goes on, and a scaler of the loss finds what it
        looks for.
        """
        if all(parameter.grad is None for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def _split_failure(self, outputs: Any, targets: Any) -> HessianFlowError | None:
        """Return why the loss cannot be cut into parts; the ranks raise it together."""
        try:
            self._check_split(outputs, targets)
        except HessianFlowError as error:
            return error
        return None

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def _backward(
        self,
        averaged: Averaged,
        divisor: Weight,
        count: int,
        leaf: Tensor | None,
        *,
        last: bool,
    ) -> None:
        """Add the gradient of one microbatch to `.grad`; `last`: that of the step is complete then.

        Hooks that run when a gradient is accumulated (`register_post_accumulate_grad_hook`) see the
        complete one, once a step, for any number of microbatches; hooks on gradients
        (`register_hook`) see that of each microbatch.
        """
        # The gradient of nothing may be nan in a loss of the user's own: its weight is awaited.
        if averaged.may_break_on_nothing and float(averaged.weight) == 0:
            if leaf is not None:
                leaf.grad = torch.zeros_like(leaf)
            if last:
                self._be_zero()
            with self.world.last_backward(divisor) if last else nullcontext():
                return
        if not averaged.value.requires_grad:
            raise HessianFlowError(
                "the loss depends on nothing that is trained: its graph was cut (by .detach(),"
                " .item() or torch.no_grad() in the model or the loss), or all parameters in it are"
                " frozen"
            )
        weight = _like(_ratio(averaged.weight, divisor), averaged.value)
        scaled = self.scaler.scale(averaged.value * weight)
        hooked = (
            bool(self.observers) or not last or self.world.world_size > 1
        ) and self._is_hooked()
        # Ranks may send a gradient off as soon as it is there: not before the hooks have been at
        # it.
        with self.world.last_backward(divisor) if last and not hooked else nullcontext():
            if self.observers:
                self._observed_backward(scaled, weight, count, leaf, into_grad=last and hooked)
            elif hooked and not last:
                self._add_to_grad(self._gradients(scaled, leaf))
            else:
                self._run_backward(scaled)
        if last and hooked:
            with self.world.last_backward(divisor):
                pass

    def _observed_backward(
        self,
        scaled: Tensor,
        weight: float | Tensor,
        count: int,
        leaf: Tensor | None,
        *,
        into_grad: bool,
    ) -> None:
        """Show the gradient of one microbatch to the observers, and add it; `into_grad`: by torch,
        hooks and all."""
        if into_grad:
            found: dict[int, Tensor] = {}
            handles = [
                parameter.register_hook(partial(found.__setitem__, number))  # type: ignore[no-untyped-call]
                for number, parameter in enumerate(self.parameters)
            ]
            try:
                self._run_backward(scaled)
            finally:
                for handle in handles:
                    handle.remove()
            gradients: list[Tensor | None] = [found.get(n) for n in range(len(self.parameters))]
        else:
            gradients = self._gradients(scaled, leaf)
            self._add_to_grad(gradients)
        if self.create_graph:
            gradients = [None if gradient is None else gradient.detach() for gradient in gradients]
        pairs = zip(self.parameters, gradients, strict=True)
        shown = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        self._refuse_sparse(shown)
        if isinstance(weight, Tensor):
            # A part that weighs nothing has a gradient of 0, which is shown as such.
            shown = list(
                torch._foreach_div(shown, weight.clamp_min(torch.finfo(weight.dtype).tiny))
            )
        elif weight != 1:
            shown = list(torch._foreach_div(shown, weight))
        for observer in self.observers:
            observer.on_microbatch(self._unscaled(shown), count)

    def _gradients(self, scaled: Tensor, leaf: Tensor | None) -> list[Tensor | None]:
        """Those of the parameters, without a hook on accumulation; that of the inputs goes to their
        `.grad`."""
        wanted = [*self.parameters, *([] if leaf is None else [leaf])]
        found: list[Tensor | None] = list(
            torch.autograd.grad(scaled, wanted, allow_unused=True, create_graph=self.create_graph)
        )
        if leaf is not None:
            leaf.grad = found.pop()
        return found

    def _add_to_grad(self, gradients: Sequence[Tensor | None]) -> None:
        sums, parts = [], []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                # A copy: two parameters may have been given one tensor, and whoever clips writes to
                # it.
                parameter.grad = gradient.clone()
            else:
                sums.append(parameter.grad)
                parts.append(gradient)
        if sums:
            torch._foreach_add_(sums, parts)

    def _run_backward(self, scaled: Tensor) -> None:
        if not self.create_graph:
            scaled.backward()  # type: ignore[no-untyped-call]
            return
        # a parameter and its gradient hold each other then, until the step is over
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scaled.backward(create_graph=True)  # type: ignore[no-untyped-call]

    def _is_hooked(self) -> bool:
        """Return whether somebody's hooks run when a gradient is accumulated; the world's own do
        not count."""
        for parameter in self.parameters:
            hooks = parameter._post_accumulate_grad_hooks  # torch has no public way to ask
            if hooks and not all(_is_ours(hook) for hook in hooks.values()):
                return True
        return False

    def _refuse_sparse(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient.layout is not torch.strided:
                raise HessianFlowError(
                    f"the gradient of {name_of(self.model, parameter)} is sparse, which"
                    f" {type(self.observers[0]).__name__} cannot be shown: build its layer with"
                    " sparse=False"
                )

    def _show_whole(self, total: int, factor: float | Tensor | None = None) -> None:
        """Show the gradient of the mean loss over all rows; `.grad` holds `factor` times that
        (None: once)."""
        if not self.observers:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.create_graph:
            gradients = [gradient.detach() for gradient in gradients]
        if factor is not None:
            gradients = [gradient / factor for gradient in gradients]
        for observer in self.observers:
            observer.on_step(self._unscaled(gradients), total)

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        # Waits for the device, but only under fp16 with observers: the scale lives there.
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        return gradients if scale == 1.0 else list(torch._foreach_div(gradients, scale))


class _Divisor:
    """What the gradients in `.grad` are divided by: the weight of all rows that count.

    It is known ahead for losses of torch. For others it is known when the last part has been
    forwarded; until then the number of rows stands in for it.

    Args:
        rows: of the batch.
        ahead: its weight, where that is known.
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
        """All parts have been counted: divide by their weight from now on, and so what is in
        `.grad` already."""
        if self._is_known:
            return
        factor = _ratio(self.value, self._sum)
        self.value = self._sum
        self._is_known = True
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


def _ratio(part: Weight, whole: Weight) -> Weight:
    """part / whole, and 0 of nothing; 1 where they are the very same, whose loss counts for nothing
    by itself."""
    if part is whole:
        return 1.0
    if isinstance(whole, Tensor):
        return torch.where(whole > 0, part / whole, 0.0)
    return part / whole if whole != 0 else 0.0


def _share_of_mean(loss: Tensor, part: Weight, whole: Weight) -> Tensor:
    """Return what the mean loss of a part adds to that of the whole; 0 where nothing counts,
    whatever that loss is."""
    if part is not whole:
        return weighted(loss, _like(_ratio(part, whole), loss))
    if isinstance(whole, Tensor):
        return torch.where(whole > 0, loss, 0.0)
    return loss if whole > 0 else torch.zeros_like(loss)


def _like(weight: float | Tensor, loss: Tensor) -> float | Tensor:
    return weight.to(loss.dtype) if isinstance(weight, Tensor) else weight


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("hessianflow.")
