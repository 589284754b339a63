"""The Hessian of the loss with respect to the inputs, which adversarial regularisation flattens.

A product is a second reverse pass through the graph of the input gradient, which is built once and
reused. The object is an :class:`interfaces.LinearOperator` with size, device, dtype and matvec, so
the eigenvalue routines of `hf.curvature` take it as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import attacking
from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import mean_loss


class InputHessian:
    """The Hessian of the summed loss of a batch with respect to its inputs, as an operator.

    With `norm_mode="eval"` the examples do not interact. The matrix is then block diagonal, one
    block per example, and its top eigenvalue is the largest of the examples'. It is valid until the
    weights change, so make a new one after each step.

    Args:
        model: Model whose output `loss_fn` takes; it is left unchanged.
        x: Inputs, shape [N, ...].
        y: Targets, shape [N, ...].
        loss_fn: Training loss.
        norm_mode: Statistics of batch normalisation, "eval" for the running ones or "batch".

    Raises:
        HessianFlowError: The inputs are not one tensor, or the loss does not depend on them.

    Example:
        >>> loss_fn = nn.MSELoss(reduction="sum")
        >>> operator = InputHessian(nn.Identity(), torch.ones(1, 2), torch.zeros(1, 2), loss_fn)
        >>> operator.matvec(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss_fn: LossFn = cross_entropy,
        *,
        norm_mode: NormMode = "eval",
    ) -> None:
        check_one_tensor(x)
        if not x.is_floating_point():
            raise HessianFlowError(
                f"inputs must be floating point to be differentiated by, got {x.dtype}; convert"
                " them (for images: x.float() / 255)"
            )
        with attacking(model, norm_mode) as frozen:
            self._inputs = x.detach().clone().requires_grad_()
            loss = mean_loss(loss_fn, frozen(self._inputs), y) * len(x)
            gradient: Tensor | None = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(
                    loss, self._inputs, create_graph=True, allow_unused=True
                )
        if gradient is None:
            raise HessianFlowError(
                "the loss does not depend on the inputs: there is no input curvature to measure"
            )
        self._gradient = gradient

    @property
    def size(self) -> int:
        """Return the number of input components of the batch."""
        return self._inputs.numel()

    @property
    def device(self) -> torch.device:
        """Return the device of the products."""
        return self._inputs.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the products."""
        return self._inputs.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a flat vector, shape [size]."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(vector)
        along = vector.reshape(self._inputs.shape)
        product: Tensor
        (product,) = torch.autograd.grad(
            self._gradient, self._inputs, along, retain_graph=True, materialize_grads=True
        )
        return product.flatten()
