"""The Hessian of the loss with respect to the inputs: what adversarial regularisation flattens.

Products come from a second reverse pass through the graph of the input gradient, which is built
once and reused. The object has size, device, dtype and matvec (:class:`interfaces.LinearOperator`),
so the eigenvalue routines of `hf.curvature` take it as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import attacking
from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import mean_loss


class InputHessian:
    """The Hessian of the summed loss of a batch with respect to its inputs, as a matrix-free
    operator.

    With `norm_mode="eval"` examples do not see each other: the matrix is block diagonal, one block
    an example, and its top eigenvalue is the largest of the examples'. Valid until the weights
    change: make a new one after a step.

    Args:
        model: maps inputs to whatever `loss_fn` takes; left as found.
        x: inputs, shape [N, ...].
        y: targets, shape [N, ...].
        loss_fn: the loss trained on.
        norm_mode: statistics that batch normalisation uses.

    Raises:
        HessianFlowError: inputs that are not one tensor, or a loss that does not depend on them.

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
            found: tuple[Tensor | None, ...] = (None,)
            if loss.requires_grad:
                found = torch.autograd.grad(
                    loss, self._inputs, create_graph=True, allow_unused=True
                )
        if found[0] is None:
            raise HessianFlowError(
                "the loss does not depend on the inputs: there is no input curvature to measure"
            )
        self._gradient = found[0]

    @property
    def size(self) -> int:
        """Number of input components of the batch."""
        return self._inputs.numel()

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self._inputs.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of products."""
        return self._inputs.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a flat vector, shape [size]; zero where the loss is linear in the
        inputs."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(vector)
        (product,) = torch.autograd.grad(
            self._gradient,
            self._inputs,
            vector.reshape(self._inputs.shape),
            retain_graph=True,
            allow_unused=True,
        )
        return torch.zeros_like(vector) if product is None else product.flatten()
