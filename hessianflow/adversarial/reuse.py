"""Adversarial examples at no extra pass: the input gradient of an example's last visit, kept until
the next.

Ours. The backward pass of a training step reaches the inputs for the price of one more product in
the first layer. The sign of what arrives there is kept for every example of the data set (one byte
a component), in the frame of the stored image: the crop and the flip of the visit are undone, and
those of the next one applied. The next visit then trains on

    x' = clamp(x + eps * sign(g)),
    g: gradient of the loss at the last visit, at the inputs trained on then,

an FGSM example that is one epoch stale. The relatives are "free" adversarial training (Shafahi et
al., arXiv 1904.12843), which replays one batch several times, and ATTA (Zheng et al., arXiv
1912.11969), which keeps perturbations between epochs and attacks once more from there; this one
never makes a pass of its own.

Pixels that the last visit cropped away have no gradient and are not moved; on its first visit an
example is clean.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hessianflow.adversarial.adversaries import ABSA_EPS
from hessianflow.adversarial.budget import (
    PerChannel,
    ValueRange,
    check_in_range,
    check_one_tensor,
    make_budget,
    place,
)
from hessianflow.adversarial.mixing import ABSA_SHARE, check_share, perturbed_rows
from hessianflow.interfaces import Exposure, HessianFlowError, Pending, Reducer


@runtime_checkable
class TracedBatches(Protocol):
    """Batches that know which examples the latest one held and where its pixels came from:
    `hf.data.DeviceBatches`."""

    @property
    def num_examples(self) -> int:
        """Size of the data set."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of images."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the batches live."""
        ...

    @property
    def latest(self) -> Tensor:
        """Indices of the examples of the latest batch, int64 [n]."""
        ...

    def as_in_latest(self, maps: Tensor) -> Tensor:
        """Maps in the frame of the stored images, [n, C, H, W], moved as the latest batch was
        augmented."""
        ...

    def as_stored(self, maps: Tensor) -> Tensor:
        """Return the inverse; zero where the augmentation had cut something off."""
        ...


class GradientReuse:
    """FGSM with the input gradients of each example's last visit.

    Args:
        batches: the training data; asked which examples the batch at hand holds.
        eps: largest change of a component, one number or one per channel, in the units of the
            inputs. Default: ABSA's.
        share: of each batch that is attacked, in [0, 1], before a controller's factor. Default:
            ABSA's.
        value_range: (smallest, largest) valid value; None: do not clamp.

    Raises:
        HessianFlowError: as :func:`attacks.fgsm`; batches that cannot be traced.
    """

    staleness: int = 0  # nothing is drawn ahead (the gradients themselves are an epoch old),
    attacks_late: bool = True  # every batch is perturbed at its use

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
        """`share` of the rows, spread evenly, moved by what their last visit left; no pass through
        the model.

        Raises:
            HessianFlowError: a share outside [0, 1]; integer inputs, or (first call) inputs outside
                the valid range; inputs that are not the latest batch, of its size.
        """
        self._check(inputs)
        rows = perturbed_rows(len(inputs), share, inputs.device)
        moved = self._batches.as_in_latest(self._signs[self._batches.latest])[rows]
        budget, result = place(self._budget, inputs), inputs.detach().clone()
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
        """Return the moved inputs in place of the clean ones; the gradient of the step by them is
        kept."""
        return Exposure((adversarial, targets), on_input_gradient=self._keep)

    def join(self, reducer: Reducer) -> None:
        """Take this process's place among the ranks.

        Raises:
            HessianFlowError: there are several.
        """
        if reducer.world_size > 1:
            raise HessianFlowError(
                "reuse keeps the gradients of one process's examples, which go to other ranks in"
                f" the next epoch: use another adversary on {reducer.world_size} ranks"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the kept signs, int8 [examples, C, H, W]."""
        return {"signs": self._signs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._signs = state["signs"].to(self._batches.device).clone()

    def _keep(self, gradient: Tensor) -> None:
        self._signs[self._batches.latest] = self._batches.as_stored(gradient.sign().to(torch.int8))

    def _check(self, inputs: Tensor) -> None:
        check_one_tensor(inputs)
        expected = (len(self._batches.latest), *self._batches.input_shape)
        if tuple(inputs.shape) != expected:
            raise HessianFlowError(
                f"reuse keeps gradients of images as they are stored, {list(expected)}, but was"
                f" given inputs of shape {list(inputs.shape)}: leave out the transform that changes"
                " their size or number"
            )
        budget = place(self._budget, inputs)
        if not self._checked:
            check_in_range(budget, inputs)
            self._checked = True
