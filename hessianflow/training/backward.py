"""Backward passes of the microbatches of a step: what they leave in `.grad`, and who is shown it.

Hooks that run when a gradient is accumulated (`register_post_accumulate_grad_hook`) see the
complete one, once a step, for any number of microbatches; hooks on gradients (`register_hook`) see
that of each microbatch. Observers are shown both.
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
from hessianflow.training.divisor import in_type_of, ratio
from hessianflow.training.parameters import name_of

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


@dataclass
class BackwardPass:
    """Adds the gradient of one microbatch after the other to `.grad`.

    Attributes:
        model: names the parameters in errors.
        parameters: what is trained: gradients of these are made, and no others looked at.
        observers: shown the gradient of each microbatch and the whole.
        world: told which backward pass is the last.
        scaler: scales the loss, where it is enabled.
        create_graph: gradients can be differentiated again.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    observers: Sequence[GradientObserver]
    world: World
    scaler: torch.amp.GradScaler
    create_graph: bool = field(default=False, init=False)

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(
        self, averaged: Averaged, divisor: Weight, count: int, leaf: Tensor | None, *, last: bool
    ) -> None:
        """Add the gradient of one microbatch.

        Args:
            averaged: its mean loss, and what that divides by.
            divisor: what the mean loss of the step divides by.
            count: the number of its rows.
            leaf: its inputs, where their gradient is wanted, too.
            last: the gradient of the step is complete then.

        Raises:
            HessianFlowError: the loss depends on nothing that is trained, or a gradient is sparse
                and an observer is to be shown it.
        """
        # The gradient of nothing may be nan in a loss of the user's own: its weight is awaited.
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
        weight = in_type_of(averaged.value, ratio(averaged.weight, divisor))
        loss = averaged.value
        if isinstance(weight, Tensor) or weight != 1:
            loss = loss * weight
        scaled = self.scaler.scale(loss)
        matters = bool(self.observers) or not last or self.world.world_size > 1
        hooked = matters and self._is_hooked()
        # Ranks may send a gradient off as soon as it is there: not before the hooks have been at
        # it.
        leaves = last and not hooked
        with self.world.last_backward(divisor) if leaves else _NO_CONTEXT:
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
        """Set the gradient to 0 where no part of a batch gave one, because nothing counts in it.

        So it is for losses of torch, too: momentum goes on, and a scaler of the loss finds what it
        looks for.
        """
        if all(parameter.grad is None for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def _observed_backward(
        self, scaled: Tensor, weight: Weight, count: int, leaf: Tensor | None, *, into_grad: bool
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

    def show_whole(self, total: int, factor: float | Tensor | None = None) -> None:
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


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("hessianflow.")
