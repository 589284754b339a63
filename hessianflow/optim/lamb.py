"""LAMB: layer-wise adaptive moments.

You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large batch optimization
for deep learning: training BERT in 76 minutes", ICLR 2020, arXiv:1904.00962, algorithm 2 with
phi(z) = z:

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd w,
    w -= lr * (||w|| / ||u||) * u.

Deviations: the trust ratio is 1 if a norm is 0; tensors that are not adapted take the step with
ratio 1 (AdamW); the gradient may first be clipped to a global norm, as in common implementations.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessianflow.checks import check_limit
from hessianflow.optim.checks import CheckedOptimizer, check_betas
from hessianflow.optim.foreach import (
    Factor,
    Tensors,
    add_scaled_,
    buckets,
    gradients_of,
    loss_of,
    norms,
    number,
    scale_,
    scaled,
    spread,
    state_tensors,
)

Loss = TypeVar("Loss")


class LAMB(CheckedOptimizer):
    """Adam whose step in each layer has the length lr * ||w||.

    Args:
        params: Parameters or parameter groups; every option below but `max_grad_norm` may differ by
            group.
        lr: Learning rate; a 0-dim tensor only with `capturable`.
        betas: Decay rates (b1, b2) of the moments.
        eps: Number added to the root of the second moment (1e-6, as in the paper's code).
        weight_decay: Weight decay wd, inside the norm (0.01 is usual).
        max_grad_norm: Global norm to which the gradient is clipped first, without a host sync; None
            for no clipping.
        adapt_vectors: Also adapt tensors of at most one dimension, which otherwise take AdamW's
            step.
        decay_vectors: Also apply weight decay to tensors of at most one dimension.
        capturable: Count steps on the device, so that a CUDA graph may be captured. `lr` may then
            be a tensor, which schedules change in place; a number is captured as a constant, as in
            torch's optimizers.

    Raises:
        HessianFlowError: An option is out of its bounds, a group is empty, or a parameter is
            complex or sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        adapt_vectors: bool = False,
        decay_vectors: bool = False,
        capturable: bool = False,
    ) -> None:
        check_limit("max_grad_norm", max_grad_norm, "no clipping")
        self.max_grad_norm = max_grad_norm
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt_vectors": adapt_vectors,
            "decay_vectors": decay_vectors,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_betas(group["betas"])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss] | None = None
    ) -> Loss | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Function that computes the gradients and returns the loss.

        Raises:
            HessianFlowError: The closure returned None, a gradient is sparse, or a parameter
                changed its shape.
        """
        loss: Loss | None = loss_of(closure)
        work = [
            (group, params, is_matrix)
            for group in self.param_groups
            for (_, _, is_matrix), params in buckets(group["params"], type(self).__name__).items()
        ]
        clip = self._clip_factor([params for _, params, _ in work])
        for group, params, is_matrix in work:
            self._update(group, params, is_matrix, clip)
        return loss

    def _clip_factor(self, lists: list[Tensors]) -> Factor:
        """Return min(1, max_grad_norm / global norm), on the device of the first parameter."""
        if self.max_grad_norm is None or not lists:
            return 1.0
        squares = [
            norms(gradients_of(params)).square().sum().to(lists[0][0].device) for params in lists
        ]
        return (self.max_grad_norm / torch.stack(squares).sum().sqrt()).clamp(max=1.0)

    def _update(
        self, group: dict[str, Any], params: Tensors, is_matrix: bool, clip: Factor
    ) -> None:
        if isinstance(clip, Tensor):
            clip = clip.to(params[0])
        direction = self._adam(group, params, scaled(gradients_of(params), clip))
        if group["weight_decay"] and (is_matrix or group["decay_vectors"]):
            torch._foreach_add_(direction, params, alpha=group["weight_decay"])
        rate: Factor = group["lr"]
        if is_matrix or group["adapt_vectors"]:
            weight = norms(params)
            length = norms(direction)
            rate = group["lr"] * torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        add_scaled_(params, direction, rate, sign=-1.0)

    def _adam(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> Tensors:
        """Return m_hat / (sqrt(v_hat) + eps) as new tensors."""
        beta1, beta2 = group["betas"]
        first = state_tensors(self.state, params, "exp_avg")
        second = state_tensors(self.state, params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        scale_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        steps = self._advance(params, group["capturable"])
        denominator = torch._foreach_sqrt(second)
        _multiply_(denominator, (1 - beta2**steps).rsqrt())
        torch._foreach_add_(denominator, number(group["eps"], params))
        direction = torch._foreach_div(first, denominator)
        _multiply_(direction, (1 - beta1**steps).reciprocal())
        return direction

    def _advance(self, params: Tensors, capturable: bool) -> Tensor:
        """Count one more step of each parameter, and return the counts.

        They are on the device only if capturable.
        """
        for parameter in params:
            if "step" not in self.state[parameter]:
                device = parameter.device if capturable else "cpu"
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        steps = [self.state[parameter]["step"] for parameter in params]
        torch._foreach_add_(steps, 1)
        return torch.stack(steps).double()


def _multiply_(tensors: Tensors, factors: Tensor) -> None:
    """Multiply every tensor by its factor in place, without a synchronisation.

    Factors on the host become numbers for tensors on a GPU.
    """
    if factors.device == tensors[0].device:
        torch._foreach_mul_(tensors, spread(factors, tensors))
    else:
        torch._foreach_mul_(tensors, factors.tolist())
