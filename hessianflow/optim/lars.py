"""LARS: layer-wise adaptive rate scaling.

You, Gitman, Ginsburg, "Large batch training of convolutional networks", arXiv:1708.03888.

With w a weight tensor, g its gradient, b the weight decay, m the momentum, lr the rate and eta the
trust coefficient, the paper's step is

    ratio = eta * ||w|| / (||g|| + b * ||w||),
    v = m * v + lr * ratio * (g + b * w),    w = w - v.

Published variants, by the name of `form`; d = g + b * w:

    form          ratio                                    step
    "paper"       eta ||w|| / (||g|| + b ||w||)            v = m v + lr ratio d;  w -= v
    "tensorflow"  eta ||w|| / ||d||                        v = m v + lr ratio d;  w -= v
    "outside"     eta ||w|| / (||g|| + b ||w||)            v = m v + ratio d;     w -= lr v
    "larc"        min(eta ||w|| / (||g|| + b ||w||) / lr, 1)   v = m v + ratio d;  w -= lr v
    "late"        eta ||w|| / ||d||                        v = m v + d;           w -= lr ratio v

"tensorflow" is the classic momentum of the TensorFlow models classes, "outside" the order of timm,
"larc" the clipped rate of apex, "late" the form of the official CLARS code. All forms agree on the
first step up to the denominator and differ once the learning rate changes. `eps` is added to every
denominator.

Deviations: the ratio is 1 if a norm is 0 (the paper does not treat this case); tensors that are not
adapted take the step of `torch.optim.SGD`, with the rate outside the buffer, in every form.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessianflow.checks import check_choice, check_number
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.checks import CheckedOptimizer
from hessianflow.optim.foreach import (
    Factor,
    Tensors,
    add_scaled_,
    buckets,
    gradients_of,
    loss_of,
    norms,
    scale_,
    scaled,
    state_tensors,
)

Form = Literal["paper", "tensorflow", "outside", "larc", "late"]

Loss = TypeVar("Loss")


class LARS(CheckedOptimizer):
    """SGD with momentum whose rate in each layer is proportional to ||w|| / ||g||.

    The step works on lists of tensors: the number of kernel launches does not grow with the number
    of tensors, and nothing is read back to the host. Half-precision norms are computed in single
    precision.

    Args:
        params: Parameters or parameter groups; every option below may differ by group.
        lr: Learning rate; a 0-dim tensor only with `capturable`.
        momentum: Momentum m (0.9 in the paper).
        weight_decay: Weight decay b.
        trust_coefficient: Factor eta of the ratio (0.001 in the paper).
        eps: Number added to the denominator of the ratio (0, as in the paper).
        form: Published form, which decides where ratio and rate enter. "paper" is that of the
            paper, "tensorflow" of the TensorFlow models, "outside" of timm, "larc" of apex, and
            "late" of the official code of CLARS.
        nesterov: Step along (scaled gradient) + momentum * buffer, as `torch.optim.SGD` does.
        adapt_vectors: Also adapt tensors of at most one dimension (biases, normalisation), which
            otherwise take the step of plain SGD.
        decay_vectors: Also apply weight decay to tensors of at most one dimension.
        capturable: Allow `lr` to be a tensor on the device, which schedules change in place, so
            that a captured CUDA graph reads the current rate; a number is captured as a constant,
            as in torch's optimizers.

    Raises:
        HessianFlowError: An option is out of its bounds, a group is empty, or a parameter is
            complex or sparse.
    """

    _flags = ("nesterov", "adapt_vectors", "decay_vectors", "capturable")
    _amounts = ("weight_decay", "trust_coefficient", "eps")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        form: Form = "paper",
        nesterov: bool = False,
        adapt_vectors: bool = False,
        decay_vectors: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "form": form,
            "nesterov": nesterov,
            "adapt_vectors": adapt_vectors,
            "decay_vectors": decay_vectors,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_number("momentum", group["momentum"], below=1)
        check_choice("form", group["form"], get_args(Form))
        if group["nesterov"] and group["momentum"] == 0:
            raise HessianFlowError("momentum must be > 0 with nesterov, got 0")

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
        for group in self.param_groups:
            for (_, _, is_matrix), params in buckets(group["params"], type(self).__name__).items():
                self._update(group, params, is_matrix)
        return loss

    @torch.no_grad()
    def layer_ratios(self, group: dict[str, Any]) -> dict[Tensor, float]:
        """Return the ratio of each tensor of a group under the gradients at hand, without a step.

        Tensors without a gradient are left out; it is 1 for those that are not adapted. The call
        waits for the device.
        """
        found: dict[Tensor, float] = {}
        for (_, _, is_matrix), params in buckets(group["params"], type(self).__name__).items():
            found.update(dict.fromkeys(params, 1.0))
            if is_matrix or group["adapt_vectors"]:
                grads = gradients_of(params)
                decay, decayed = self._decayed(group, params, is_matrix)
                ratios = self._ratios(group, params, grads, decayed, decay)
                found.update(zip(params, ratios.tolist(), strict=True))
        return found

    @staticmethod
    def _decayed(group: dict[str, Any], params: Tensors, is_matrix: bool) -> tuple[float, Tensors]:
        """Return the decay of some tensors, and their gradients with it."""
        grads = gradients_of(params)
        if not group["weight_decay"] or not (is_matrix or group["decay_vectors"]):
            return 0.0, grads
        decay: float = group["weight_decay"]
        return decay, torch._foreach_add(grads, params, alpha=decay)

    def _update(self, group: dict[str, Any], params: Tensors, is_matrix: bool) -> None:
        grads = gradients_of(params)
        decay, decayed = self._decayed(group, params, is_matrix)
        inner: Factor = 1.0
        outer: Factor = group["lr"]
        if is_matrix or group["adapt_vectors"]:
            ratios = self._ratios(group, params, grads, decayed, decay)
            inner, outer = _factors(group["form"], ratios, group["lr"])
        direction = self._direction(group, params, decayed, inner)
        add_scaled_(params, direction, outer, sign=-1.0)

    def _direction(
        self, group: dict[str, Any], params: Tensors, decayed: Tensors, inner: Factor
    ) -> Tensors:
        momentum = group["momentum"]
        if momentum == 0:
            return scaled(decayed, inner)
        velocity = state_tensors(self.state, params, "momentum_buffer")
        scale_(velocity, momentum)
        if not group["nesterov"]:
            add_scaled_(velocity, decayed, inner)
            return velocity
        current = scaled(decayed, inner)
        torch._foreach_add_(velocity, current)
        return torch._foreach_add(current, velocity, alpha=momentum)

    def _ratios(
        self, group: dict[str, Any], params: Tensors, grads: Tensors, decayed: Tensors, decay: float
    ) -> Tensor:
        """Return the ratio of every tensor, shape [len(params)]."""
        of_decayed = group["form"] in ("tensorflow", "late")
        gradients = decayed if of_decayed else grads
        both = norms([*params, *gradients]).view(2, -1)
        weight, denominator = both.unbind()
        if decay and not of_decayed:
            denominator = torch.add(denominator, weight, alpha=decay)
        if group["eps"]:
            denominator = denominator + group["eps"]
        ratio = group["trust_coefficient"] * weight / denominator
        if group["form"] == "larc":
            ratio = (ratio / group["lr"]).clamp(max=1.0)
        return torch.where((both > 0).all(0), ratio, 1.0)


def _factors(form: Form, ratio: Tensor, lr: float | Tensor) -> tuple[Factor, Factor]:
    """Return the factor of the gradient that enters the buffer, and that of the resulting step."""
    if form in ("paper", "tensorflow"):
        return lr * ratio, 1.0
    if form == "late":
        return 1.0, lr * ratio
    return ratio, lr
