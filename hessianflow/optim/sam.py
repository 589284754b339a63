"""Sharpness-aware minimisation: the adversary moves the weights instead of the inputs.

Foret, Kleiner, Mobahi, Neyshabur, arXiv 2010.01412, equation 2 and algorithm 1 (p = 2):

    e = rho * g / ||g||,  g the gradient at w over all parameters;  w = base optimizer's step from w
    along the gradient at w + e.

`AdaptiveBatchTrainer` gives every optimizer whose `step` requires a closure one that computes the
gradient of the same batch anew: the same adversarial examples, with the loss and the hits at the
clean weights recorded.

A gradient of zero names no direction: the weights are then not moved (no epsilon in the
denominator). Batch normalisation's running statistics should see the clean weights only: run the
second closure inside :func:`frozen_statistics`, which `SAM(..., model=model)` does by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hessianflow.checks import is_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap


def sam_perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return the weight change of length rho that raises the linearised loss most: rho * g_i /
    ||(g_1, ..., g_n)||_2.

    Args:
        gradients: one tensor a parameter.
        rho: length, in the units of the weights.

    Returns:
        One tensor a parameter; zeros where the whole gradient is zero. Computed without waiting for
            the device.

    Raises:
        HessianFlowError: rho negative or not finite.
    """
    _check_rho(rho)
    if not gradients:
        return []
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return list(torch._foreach_mul(list(gradients), scale))


class SAM(Optimizer):
    """Steps any optimizer along the gradient at the worst nearby weights.

    Args:
        base: the optimizer that steps; parameter groups and state are shared with it, so schedulers
            work on either.
        rho: radius of the neighbourhood; 0: the base optimizer. Default: the usual one.
        model: its batch-normalisation statistics are held during the second gradient; None: no
            model has any.

    Raises:
        HessianFlowError: `rho` is negative or not finite, or `base` no optimizer.

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
        _check_rho(rho)
        if not isinstance(base, Optimizer):
            raise HessianFlowError(
                f"SAM steps another optimizer, such as torch.optim.SGD(...), got {base!r}"
            )
        self.base, self.rho, self._model = base, rho, model
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.state = base.state

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Two gradients, one step.

        Args:
            closure: zeroes the gradients, computes them anew and returns the loss; called at the
                weights and at the perturbed ones. The weights are put back exactly, also when it
                raises.

        Returns:
            The loss at the weights themselves.

        Raises:
            HessianFlowError: there is no closure.
        """
        if closure is None:
            raise HessianFlowError(
                "SAM needs two gradients a step: call step(closure), with a closure that zeroes the"
                " gradients, computes them anew and returns the loss (AdaptiveBatchTrainer gives it"
                " one)"
            )
        with torch.enable_grad():
            loss = closure()
            params = [
                p for group in self.param_groups for p in group["params"] if p.grad is not None
            ]
            gradients = [p.grad for p in params]
            with (
                _moved(params, sam_perturbation(gradients, self.rho)),
                frozen_statistics(self._model),
            ):
                closure()
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base optimizer."""
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.state = self.base.state


@contextmanager
def frozen_statistics(model: nn.Module | None) -> Iterator[None]:
    """Inside, batch normalisation in training mode uses the batch's statistics and leaves the
    running ones alone."""
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


def _check_rho(rho: float) -> None:
    if not is_number(rho) or not 0 <= rho < float("inf"):
        raise HessianFlowError(f"rho must be finite and at least 0, got {rho}")
