"""Extrapolation (extragradient), which wraps any optimizer.

Lin, Kong, Stich, Jaggi, "Extrapolation for large-batch training in deep learning", ICML 2020,
arXiv:2006.05720.

    w' = w - lookahead_lr * (gradient at w),
    w = base optimizer's step from w along the gradient at w'.

In the paper, the first gradient is each worker's own, of its small batch, without communication;
the second is averaged as usual. The first gradient may come from other examples than the second.
`AdaptiveBatchTrainer` gives a closure to this optimizer, as it does to SAM: both gradients are then
of the same whole batch, over all microbatches and all ranks, so that steps do not depend on the
numbers of these.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.checks import check_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.foreach import gradients_of, loss_of
from hessianflow.optim.wrapping import WrappingOptimizer

Loss = TypeVar("Loss")


class Extrapolation(WrappingOptimizer):
    """Steps another optimizer along the gradient at a point ahead of the weights.

    Call `step(closure)`, which calls the closure twice, or, in your own loop: compute gradients,
    call :meth:`lookahead`, compute gradients at the new point, call :meth:`step`. A step without a
    look-ahead is the base optimizer's.

    Args:
        base: Optimizer that steps.
        lookahead_lr: Rate of the look-ahead, in the range of small-batch rates; 0 for the base
            optimizer's step. Keep it below one over the largest Hessian eigenvalue: a longer
            look-ahead lands past the minimum along that eigenvector, and the step then climbs.

    Raises:
        HessianFlowError: `lookahead_lr` is negative or not finite, or `base` is no optimizer.
    """

    wants_closure = True
    """Whether a training loop that can give a closure should, since a step without does not look
    ahead."""

    def __init__(self, base: Optimizer, lookahead_lr: float) -> None:
        check_number("lookahead_lr", lookahead_lr)
        self.lookahead_lr = lookahead_lr
        self._origin: list[tuple[Tensor, Tensor]] = []
        super().__init__(base)

    @torch.no_grad()
    def lookahead(self) -> None:
        """Move every parameter by -lookahead_lr times its gradient, and remember its origin.

        Raises:
            HessianFlowError: The method is called twice without a step.
        """
        if self._origin:
            raise HessianFlowError("lookahead must be followed by step, got a second look-ahead")
        params = self.with_gradient()
        self._origin = [(parameter, parameter.clone()) for parameter in params]
        if params:
            torch._foreach_add_(params, gradients_of(params), alpha=-self.lookahead_lr)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss] | None = None
    ) -> Loss | None:
        """Return to the origin and step the base optimizer with the current gradients.

        Args:
            closure: Function that computes the gradients and returns the loss, called before and
                after the look-ahead. The weights are restored also if it raises.

        Returns:
            The loss at the weights themselves, if a closure was given.

        Raises:
            HessianFlowError: The closure returned None.
        """
        loss: Loss | None = None
        try:
            if closure is not None:
                loss = loss_of(closure)
                self.lookahead()
                loss_of(closure)
        finally:
            self._return()
        self.base.step()
        return loss

    @torch.no_grad()
    def _return(self) -> None:
        for parameter, origin in self._origin:
            parameter.copy_(origin)
        self._origin = []
