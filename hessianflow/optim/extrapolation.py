"""Extrapolation (extragradient) around any optimizer.

Lin, Kong, Stich, Jaggi, "Extrapolation for large-batch training in deep learning", ICML 2020,
arXiv:2006.05720.

    w' = w - lookahead_lr * (gradient at w),
    w = base optimizer's step from w along the gradient at w'.

With several workers the first gradient is each worker's own, of its small batch, without
communication; the second is averaged as usual. The first gradient may come from other examples than
the second.

`AdaptiveBatchTrainer` gives it a closure, as it does to SAM: both gradients are then of the same
whole batch, over all microbatches and all ranks, so that the steps do not depend on how many there
are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.checks import check_number
from hessianflow.optim.foreach import evaluate

Loss = TypeVar("Loss")


class Extrapolation(Optimizer):
    """Takes the gradient of any optimizer at a point ahead of the weights.

    Either `step(closure)`, which calls the closure twice, or, in one's own loop: gradients,
    :meth:`lookahead`, gradients at the new point, :meth:`step`. A step without a look-ahead is the
    base optimizer's.

    Args:
        base: the optimizer that steps; parameter groups and state are shared with it, so schedulers
            work on either.
        lookahead_lr: rate of the look-ahead, in the range of small-batch rates. 0: the base
            optimizer, up to the second gradient.

    Raises:
        HessianFlowError: `lookahead_lr` is negative or not finite, or `base` no optimizer.
    """

    wants_closure = True
    """Without a closure a step does not look ahead: a training loop that can give one should."""

    def __init__(self, base: Optimizer, lookahead_lr: float) -> None:
        check_number("lookahead_lr", lookahead_lr)
        if not isinstance(base, Optimizer):
            raise HessianFlowError(
                f"Extrapolation steps another optimizer, such as torch.optim.SGD(...), got {base!r}"
            )
        self.base, self.lookahead_lr = base, lookahead_lr
        self._origin: list[tuple[Tensor, Tensor]] = []
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.state = base.state

    @torch.no_grad()
    def lookahead(self) -> None:
        """Move every parameter by -lookahead_lr times its gradient, and remember where it was.

        Raises:
            HessianFlowError: called twice without a step.
        """
        if self._origin:
            raise HessianFlowError("lookahead must be followed by step, got a second look-ahead")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._origin = [(parameter, parameter.clone()) for parameter in params]
        if params:
            torch._foreach_add_(params, [p.grad for p in params], alpha=-self.lookahead_lr)

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:  # type: ignore[override]
        """Return to the origin and step the base optimizer with the gradients at hand.

        Args:
            closure: computes the gradients and returns the loss; called before and after the
                look-ahead. The weights are put back also when it raises.

        Returns:
            The loss at the weights themselves, if a closure was given.

        Raises:
            HessianFlowError: the closure returned None.
        """
        loss: Loss | None = None
        try:
            if closure is not None:
                loss = evaluate(closure)
                self.lookahead()
                evaluate(closure)
        finally:
            self._return()
        self.base.step()
        return loss

    @torch.no_grad()
    def _return(self) -> None:
        for parameter, origin in self._origin:
            parameter.copy_(origin)
        self._origin = []

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base optimizer."""
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.state = self.base.state
