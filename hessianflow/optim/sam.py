"""Sharpness-aware minimisation: the adversary moves the weights instead of the inputs.

Foret, Kleiner, Mobahi, Neyshabur, arXiv 2010.01412, equation 2 and algorithm 1 (p = 2):

    e = rho * g / ||g||,  g the gradient at w over all parameters;  w = base optimizer's step from w
    along the gradient at w + e.

`AdaptiveBatchTrainer` gives every optimizer whose `step` requires a closure one that computes the
gradient of the same batch again, with the same adversarial examples, and records the loss and the
hits at the clean weights.

If the gradient is zero, the weights are not moved (there is no epsilon in the denominator). The
running statistics of batch normalisation should see the clean weights only: run the second closure
inside :func:`frozen_statistics`, as `SAM(..., model=model)` does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hessianflow.checks import check_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.optim.foreach import gradients_of
from hessianflow.optim.wrapping import WrappingOptimizer


def sam_perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return the weight change rho * g / ||g||, which raises the linearised loss most.

    Args:
        gradients: Gradient g, one tensor per parameter.
        rho: Length of the change, in the units of the weights.

    Returns:
        One tensor per parameter, zeros if the whole gradient is zero. The computation does not wait
        for the device.

    Raises:
        HessianFlowError: The length rho is negative or not finite.
    """
    check_number("rho", rho)
    if not gradients:
        return []
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return list(torch._foreach_mul(list(gradients), scale))


class SAM(WrappingOptimizer):
    """Steps another optimizer along the gradient at the worst nearby weights.

    Args:
        base: Optimizer that steps.
        rho: Radius of the neighbourhood (0.05, the usual value); 0 for the base optimizer's step.
        model: Model whose batch-normalisation statistics are frozen during the second gradient;
            None if there are none.

    Raises:
        HessianFlowError: `rho` is negative or not finite, or `base` is no optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> sam = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
        >>> def closure():
        ...     weight.grad = weight.detach().clone()  # the gradient of weight**2 / 2
        ...     return weight.item() ** 2 / 2
        >>> sam.step(closure)
        4.5
        >>> round(weight.item(), 6)  # 3 - 0.1 * (3 + 0.5)
        2.65
    """

    def __init__(
        self, base: Optimizer, *, rho: float = 0.05, model: nn.Module | None = None
    ) -> None:
        check_number("rho", rho)
        self.rho = rho
        self._model = model
        super().__init__(base)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Compute the gradient at the weights and at the perturbed ones, and step with the second.

        Args:
            closure: Function that zeroes the gradients, computes them again and returns the loss,
                called twice. The weights are restored exactly, also if it raises.

        Returns:
            The loss at the weights themselves.

        Raises:
            HessianFlowError: There is no closure.
        """
        if closure is None:
            raise HessianFlowError(
                "SAM needs two gradients per step: call step(closure), with a closure that zeroes"
                " the gradients, computes them again and returns the loss (AdaptiveBatchTrainer"
                " gives it one)"
            )
        with torch.enable_grad():
            loss = closure()
            params = self.with_gradient()
            change = sam_perturbation(gradients_of(params), self.rho)
            with _moved(params, change), frozen_statistics(self._model):
                closure()
        self.base.step()
        return loss


@contextmanager
def frozen_statistics(model: nn.Module | None) -> Iterator[None]:
    """Keep the running statistics of batch normalisation, which uses those of the batch inside."""
    modules = [] if model is None else unwrap(model).modules()
    layers = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.track_running_stats = value


@contextmanager
def _moved(params: list[Tensor], by: list[Tensor]) -> Iterator[None]:
    origins = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for parameter, change in zip(params, by, strict=True):
                parameter.add_(change)
        yield
    finally:
        with torch.no_grad():
            for parameter, origin in zip(params, origins, strict=True):
                parameter.copy_(origin)
