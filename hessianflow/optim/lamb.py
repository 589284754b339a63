"""LAMB: layer-wise adaptive moments.

You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large batch optimization
for deep learning: training BERT in 76 minutes", ICLR 2020, arXiv:1904.00962, algorithm 2 with
phi(z) = z:

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd w,
    w -= lr * (||w|| / ||u||) * u.

Deviations: the trust ratio is 1 where a norm is 0; tensors that are not adapted take the step with
ratio 1 (AdamW); the gradient may first be clipped to a global norm, as the common implementations
do.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.checks import (
    CheckedOptimizer,
    check_flags,
    check_limit,
    check_number,
    check_parameters,
    check_rate,
)
from hessianflow.optim.foreach import (
    Factor,
    Tensors,
    add_scaled_,
    buckets,
    evaluate,
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
        params: parameters or parameter groups; every option below but `max_grad_norm` may differ by
            group.
        lr: learning rate; a 0-dim tensor only with `capturable`.
        betas: decay rates of the moments (b1, b2).
        eps: added to the root of the second moment (1e-6, as in the paper's code).
        weight_decay: wd, inside the norm (0.01 is usual).
        max_grad_norm: clip the gradient to this global norm first, without a host sync. None: do
            not.
        adapt_vectors: also adapt tensors of at most one dimension. Default: AdamW for them.
        decay_vectors: also apply weight decay to them. Default: none.
        capturable: steps are counted on the device, so that a CUDA graph may be captured. `lr` may
            be a tensor there, which schedules change in place; a number is captured as it is, as by
            torch's optimizers.

    Raises:
        HessianFlowError: an option is out of its bounds, a group is empty, or a parameter is
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
        check_parameters(group["params"], type(self).__name__)
        check_flags(group, "adapt_vectors", "decay_vectors", "capturable")
        check_rate(group["lr"], group["capturable"])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise HessianFlowError(f"betas must be two numbers such as (0.9, 0.999), got {betas!r}")
        for beta in betas:
            check_number("betas", beta, below=1)
        for name in ("eps", "weight_decay"):
            check_number(name, group[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes the gradients and returns the loss.

        Raises:
            HessianFlowError: the closure returned None, a gradient is sparse, or a parameter
                changed its shape.
        """
        loss: Loss | None = None if closure is None else evaluate(closure)
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
        """min(1, max_grad_norm / global norm), on the device of the first parameter."""
        if self.max_grad_norm is None or not lists:
            return 1.0
        squares = [
            norms(_gradients(params)).square().sum().to(lists[0][0].device) for params in lists
        ]
        return (self.max_grad_norm / torch.stack(squares).sum().sqrt()).clamp(max=1.0)

    def _update(
        self, group: dict[str, Any], params: Tensors, is_matrix: bool, clip: Factor
    ) -> None:
        clip = clip.to(params[0]) if isinstance(clip, Tensor) else clip
        direction = self._adam(group, params, scaled(_gradients(params), clip))
        if group["weight_decay"] and (is_matrix or group["decay_vectors"]):
            torch._foreach_add_(direction, params, alpha=group["weight_decay"])
        rate: Factor = group["lr"]
        if is_matrix or group["adapt_vectors"]:
            weight, length = norms(params), norms(direction)
            rate = group["lr"] * torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        add_scaled_(params, direction, rate, sign=-1.0)

    def _adam(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> Tensors:
        """m_hat / (sqrt(v_hat) + eps) as new tensors."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        first = state_tensors(self.state, params, "exp_avg")
        second = state_tensors(self.state, params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        scale_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        steps = self._advance(params, group["capturable"])
        denominator = torch._foreach_sqrt(second)
        _multiply_(denominator, (1 - beta2**steps).rsqrt())
        torch._foreach_add_(denominator, number(eps, params))
        direction = torch._foreach_div(first, denominator)
        _multiply_(direction, (1 - beta1**steps).reciprocal())
        return direction

    def _advance(self, params: Tensors, capturable: bool) -> Tensor:
        """Count one more step of each parameter; the counts, on the device only if capturable."""
        for parameter in params:
            if "step" not in self.state[parameter]:
                device = parameter.device if capturable else "cpu"
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        steps = [self.state[parameter]["step"] for parameter in params]
        torch._foreach_add_(steps, 1)
        return torch.stack(steps).double()


def _gradients(params: Tensors) -> list[Tensor]:
    return [parameter.grad for parameter in params if parameter.grad is not None]


def _multiply_(tensors: Tensors, factors: Tensor) -> None:
    """tensor *= its factor; those on the host become numbers for a GPU, which needs no
    synchronisation."""
    if factors.device == tensors[0].device:
        torch._foreach_mul_(tensors, spread(factors, tensors))
    else:
        torch._foreach_mul_(tensors, factors.tolist())
