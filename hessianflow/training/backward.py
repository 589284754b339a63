"""Backward passes of the microbatches of a step: they fill `.grad` and show it to observers.

Hooks that run when a gradient is accumulated (`register_post_accumulate_grad_hook`) see the
complete gradient, once a step, for any number of microbatches; hooks on gradients
(`register_hook`) see that of each microbatch. Observers are shown both.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hessianflow.interfaces import GradientObserver, HessianFlowError, World
from hessianflow.losses import Averaged, Weight
from hessianflow.training.optimizers import name_of


@dataclass
class BackwardPass:
    """Adds the gradient of one microbatch after the other to `.grad`.

    The model names the parameters in errors. With `create_graph` gradients can be differentiated
    again.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    observers: Sequence[GradientObserver]
    world: World
    scaler: torch.amp.GradScaler
    create_graph: bool = field(default=False, init=False)

    def clear(self) -> None:
        """Set the gradient of every trained parameter to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(
        self, averaged: Averaged, divisor: Weight, count: int, leaf: Tensor | None, *, last: bool
    ) -> None:
        """Add the gradient of one microbatch.

        Args:
            averaged: its mean loss and the divisor of that.
            divisor: the divisor of the mean loss of the step.
            count: the number of its rows.
            leaf: its inputs, where their gradient is wanted too.
            last: whether the gradient of the step is complete after it.

        Raises:
            HessianFlowError: the loss depends on nothing that is trained, or a gradient is sparse
                and an observer is to be shown it.
        """
        # Where no row counts, the gradient of a user's loss may be nan: this waits for the weight.
        if averaged.may_break_on_nothing and float(averaged.weight) == 0:
            if leaf is not None:
                leaf.grad = torch.zeros_like(leaf)
            if last:
                self._be_zero()
                with self.world.last_backward(divisor):
                    pass
            return
        if not averaged.value.requires_grad:
            raise HessianFlowError(
                "the loss depends on nothing that is trained: its graph was cut (by .detach(),"
                " .item() or torch.no_grad() in the model or the loss), or all parameters in it are"
                " frozen"
            )
        weight = ratio(averaged.weight, divisor)
        loss = averaged.value
        if isinstance(weight, Tensor):
            weight = weight.to(loss.dtype)
        if isinstance(weight, Tensor) or weight != 1:
            loss = loss * weight
        scaled = self.scaler.scale(loss)
        matters = bool(self.observers) or not last or self.world.world_size > 1
        hooked = matters and self._is_hooked()
        context: AbstractContextManager[None] = nullcontext()
        if last and not hooked:
            # Ranks send each gradient as soon as it is complete; hooks must have run before that.
            context = self.world.last_backward(divisor)
        with context:
            if self.observers:
                self._observed_backward(scaled, weight, count, leaf, into_grad=last and hooked)
            elif hooked and not last:
                self._add_to_grad(self._gradients(scaled, leaf))
            else:
                self._run_backward(scaled)
        if last and hooked:
            with self.world.last_backward(divisor):
                pass

    def _be_zero(self) -> None:
        """Set the gradient to 0 where no row of the batch counts, as losses of torch do.

        Momentum then continues, and a scaler of the loss finds the gradients that it must check.
        """
        if all(parameter.grad is None for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def _observed_backward(
        self, scaled: Tensor, weight: Weight, count: int, leaf: Tensor | None, *, into_grad: bool
    ) -> None:
        """Add the gradient of one microbatch, and show it to the observers.

        With `into_grad` torch itself adds it to `.grad`, which runs the hooks on accumulation.
        """
        if into_grad:
            gradients = self._hooked_gradients(scaled)
        else:
            gradients = self._gradients(scaled, leaf)
            self._add_to_grad(gradients)
        shown = self._shown(gradients)
        self.refuse_sparse(shown, f"{type(self.observers[0]).__name__} cannot be shown")
        if isinstance(weight, Tensor):
            # A microbatch of weight 0 has a gradient of 0: the clamp keeps it from becoming nan.
            positive = weight.clamp_min(torch.finfo(weight.dtype).tiny)
            shown = list(torch._foreach_div(shown, positive))
        elif weight != 1:
            shown = list(torch._foreach_div(shown, weight))
        for observer in self.observers:
            observer.on_microbatch(self._unscaled(shown), count)

    def _gradients(self, scaled: Tensor, leaf: Tensor | None) -> list[Tensor | None]:
        """Return the gradients by the parameters, and put that by the inputs into `leaf.grad`."""
        # Hooks on accumulation do not run here: they wait for the complete gradient.
        wanted: list[Tensor] = list(self.parameters)
        if leaf is not None:
            wanted.append(leaf)
        gradients: list[Tensor | None] = list(
            torch.autograd.grad(scaled, wanted, allow_unused=True, create_graph=self.create_graph)
        )
        if leaf is not None:
            leaf.grad = gradients.pop()
        return gradients

    def _hooked_gradients(self, scaled: Tensor) -> list[Tensor | None]:
        """Run the backward pass into `.grad`, and return the gradients that it added."""
        added: dict[int, Tensor] = {}
        handles = [
            parameter.register_hook(partial(added.__setitem__, number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(self.parameters)
        ]
        try:
            self._run_backward(scaled)
        finally:
            for handle in handles:
                handle.remove()
        return [added.get(number) for number in range(len(self.parameters))]

    def _add_to_grad(self, gradients: Sequence[Tensor | None]) -> None:
        sums: list[Tensor] = []
        parts: list[Tensor] = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                # A copy: autograd may give two parameters one tensor, and clipping writes to it.
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
        # torch warns that a parameter and its gradient hold each other: the step clears them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scaled.backward(create_graph=True)  # type: ignore[no-untyped-call]

    def _is_hooked(self) -> bool:
        """Return whether hooks other than the world's run when a gradient is accumulated."""
        for parameter in self.parameters:
            hooks = parameter._post_accumulate_grad_hooks  # torch has no public accessor.
            if hooks and not all(_is_ours(hook) for hook in hooks.values()):
                return True
        return False

    def refuse_sparse(
        self, gradients: Sequence[Tensor | None], reason: str, way_out: str = ""
    ) -> None:
        """Refuse gradients of which one is sparse; errors end with another `way_out`, if any."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                raise HessianFlowError(
                    f"the gradient of {name_of(self.model, parameter)} is sparse, which {reason}:"
                    f" build its layer with sparse=False{way_out}"
                )

    def show_whole(self, total: int, factor: float | Tensor | None = None) -> None:
        """Show observers the gradient over all `total` rows; `.grad` is `factor` times that."""
        if not self.observers:
            return
        gradients = self._shown([parameter.grad for parameter in self.parameters])
        if factor is not None:
            gradients = [gradient / factor for gradient in gradients]
        for observer in self.observers:
            observer.on_step(self._unscaled(gradients), total)

    def _shown(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return one gradient for each parameter, without its graph; 0 where there is none."""
        shown: list[Tensor] = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            elif self.create_graph:
                gradient = gradient.detach()
            shown.append(gradient)
        return shown

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        if not self.scaler.is_enabled():
            return gradients
        # Waits for the device, but only under fp16 with observers: the scale is kept there.
        scale = self.scaler.get_scale()
        if scale == 1.0:
            return gradients
        return list(torch._foreach_div(gradients, scale))


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("hessianflow.")


class Divisor:
    """The divisor of the gradients in `.grad`: the weight of all rows that count.

    For losses of torch it is known before the first forward pass, as `ahead`. For others it is
    known after the last one; until then the number of rows stands in for it as the `value`.
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
