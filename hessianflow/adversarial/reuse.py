"""Adversarial examples without an extra pass, from the input gradients of the last visit.

This method is our own. The backward pass of a training step reaches the inputs at the cost of one
more product in the first layer. The sign of the gradient there is kept for every example of the
data set (one byte per component), in the frame of the stored image: the crop and the flip of this
visit are undone, and those of the next visit are applied. The next visit then trains on

    x' = clamp(x + eps * sign(g)),
    g: gradient of the loss at the last visit, at the inputs of that visit,

an FGSM example that is one epoch stale. Related methods are "free" adversarial training (Shafahi et
al., arXiv 1904.12843), which replays one batch several times, and ATTA (Zheng et al., arXiv
1912.11969), which keeps perturbations between epochs and attacks again from there. This method
never makes an extra pass.

Pixels that the last visit cropped away have no gradient and are not moved. On its first visit an
example is clean.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hessianflow.adversarial.adversaries import ABSA_EPS
from hessianflow.adversarial.budget import (
    Budget,
    PerChannel,
    ValueRange,
    broadcast_to,
    check_in_range,
    check_one_tensor,
    make_budget,
)
from hessianflow.adversarial.mixing import ABSA_SHARE, check_share, perturbed_rows
from hessianflow.interfaces import Exposure, HessianFlowError, Pending, Reducer


@runtime_checkable
class TracedBatches(Protocol):
    """Batches, such as `hf.data.DeviceBatches`, that can trace the examples of the latest one."""

    @property
    def num_examples(self) -> int:
        """Return the size of the data set."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape (C, H, W) of one image."""

    @property
    def device(self) -> torch.device:
        """Return the device of the batches."""

    @property
    def latest(self) -> Tensor:
        """Return the indices of the examples of the latest batch, int64 [n]."""

    def as_in_latest(self, maps: Tensor) -> Tensor:
        """Move maps of the stored images, [n, C, H, W], as the latest batch was augmented."""

    def as_stored(self, maps: Tensor) -> Tensor:
        """Undo :meth:`as_in_latest`, with zeros where the augmentation cut something off."""


class GradientReuse:
    """Attack by FGSM with the input gradients of each example's last visit.

    Args:
        batches: Training data that can tell the examples of its latest batch.
        eps: Largest change of a component, one number or one per channel, in the units of the
            inputs, which for the command are pixels in [0, 1] (0.005 in ABSA's published code).
        share: Share of each batch that is attacked, in [0, 1], before the factor of the controller
            (0.2 in ABSA's published code).
        value_range: Smallest and largest valid value of the inputs; null stands for no clamping.

    Raises:
        HessianFlowError: As :func:`attacks.fgsm`, or if the batches cannot be traced.
    """

    staleness: int = 0  # no batch is drawn ahead, although the gradients are an epoch old
    attacks_late: bool = True  # every batch is perturbed when it is used

    def __init__(
        self,
        batches: TracedBatches,
        eps: PerChannel = ABSA_EPS,
        *,
        share: float = ABSA_SHARE,
        value_range: ValueRange | None,
    ) -> None:
        if not isinstance(batches, TracedBatches):
            raise HessianFlowError(
                f"reuse must know which examples a batch holds, which {type(batches).__name__} does"
                " not tell: use DeviceBatches, or another adversary"
            )
        self.share = check_share(share)
        self._batches = batches
        self._budget = make_budget(eps, value_range, "l_inf")
        shape = (batches.num_examples, *batches.input_shape)
        self._signs = torch.zeros(shape, dtype=torch.int8, device=batches.device)
        self._checked = False

    def attack(
        self,
        model: nn.Module,  # noqa: ARG002
        inputs: Tensor,
        targets: Tensor,  # noqa: ARG002
        share: float,
        microbatch_size: int | None = None,  # noqa: ARG002
    ) -> Pending:
        """Move `share` of the rows, spread evenly, by the gradients of their last visit.

        Raises:
            HessianFlowError: The share is outside [0, 1], or the inputs are integers, (first call)
                outside the valid range, or not of the size of the latest batch.
        """
        budget = self._checked_budget(inputs)
        rows = perturbed_rows(len(inputs), share, inputs.device)
        moved = self._batches.as_in_latest(self._signs[self._batches.latest])[rows]
        result = inputs.detach().clone()
        result[rows] = budget.clamp(result[rows] + budget.eps * moved)
        return lambda: result

    def expose(
        self,
        model: nn.Module,  # noqa: ARG002
        inputs: Tensor,  # noqa: ARG002
        targets: Tensor,
        adversarial: Tensor,
        share: float,  # noqa: ARG002
    ) -> Exposure:
        """Return the moved inputs in place of the clean ones, and keep the input gradient."""
        return Exposure((adversarial, targets), on_input_gradient=self._keep)

    def join(self, reducer: Reducer) -> None:
        """Refuse to be one of several ranks."""
        if reducer.world_size > 1:
            raise HessianFlowError(
                "reuse keeps the gradients of one process's examples, which go to other ranks in"
                f" the next epoch: use another adversary on {reducer.world_size} ranks"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the kept signs, int8 [examples, C, H, W]."""
        return {"signs": self._signs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._signs = state["signs"].to(self._batches.device).clone()

    def _keep(self, gradient: Tensor) -> None:
        self._signs[self._batches.latest] = self._batches.as_stored(gradient.sign().to(torch.int8))

    def _checked_budget(self, inputs: Tensor) -> Budget:
        """Check the inputs and return the budget broadcast to them."""
        check_one_tensor(inputs)
        expected = (len(self._batches.latest), *self._batches.input_shape)
        if tuple(inputs.shape) != expected:
            raise HessianFlowError(
                f"reuse keeps gradients of images as they are stored, {list(expected)}, but was"
                f" given inputs of shape {list(inputs.shape)}: leave out the transform that changes"
                " their size or number"
            )
        budget = broadcast_to(self._budget, inputs)
        if not self._checked:
            check_in_range(budget, inputs)
            self._checked = True
        return budget
