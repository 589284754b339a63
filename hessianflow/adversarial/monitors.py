"""What adversarial training does to a network, measured after each epoch
(:class:`interfaces.EpochMeasurement`)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import fgsm, pgd
from hessianflow.adversarial.budget import PerChannel, ValueRange, check_one_tensor
from hessianflow.adversarial.input_hessian import InputHessian
from hessianflow.adversarial.robustness import OverfittingAlarm, robust_accuracy
from hessianflow.interfaces import LinearOperator, LossFn

PGD_STEPS = 10
"""Enough to see a collapse (Wong et al., arXiv 2001.03994, watch PGD with few steps on one batch).
Ours."""


class RobustnessWatch:
    """Accuracy under FGSM and PGD on a fixed batch, with the alarm for catastrophic overfitting.

    Args:
        model: left as found.
        batch: (inputs, targets), held-out examples.
        eps: size of both attacks, as in :func:`attacks.fgsm`.
        value_range: (smallest, largest) valid value; None: do not clamp.
        collapse: see :class:`robustness.OverfittingAlarm`.
        seed: of PGD's random start, the same after every epoch.

    Raises:
        HessianFlowError: collapse outside (0, 1), or inputs that are not one tensor.
    """

    kind = "robustness"

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        eps: PerChannel,
        *,
        value_range: ValueRange | None,
        collapse: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_one_tensor(batch[0])
        self._model, self._batch, self._seed = model, batch, seed
        self._eps, self._range = eps, value_range
        self._alarm = OverfittingAlarm(collapse)

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return the accuracies, and why the alarm is raised, or nothing.

        Raises:
            HessianFlowError: as :func:`attacks.fgsm`.
        """
        source = torch.Generator(device=self._batch[0].device).manual_seed(self._seed)
        found = robust_accuracy(
            self._model,
            self._batch,
            {
                "fgsm": lambda m, x, y: fgsm(m, x, y, self._eps, value_range=self._range),
                "pgd": lambda m, x, y: pgd(
                    m, x, y, self._eps, value_range=self._range, steps=PGD_STEPS, generator=source
                ),
            },
        )
        under_fgsm, under_pgd = found["fgsm"].value, found["pgd"].value
        figures = {"fgsm_accuracy": under_fgsm, "pgd_accuracy": under_pgd}
        return figures, self._alarm.update(under_fgsm, under_pgd)

    def state_dict(self) -> dict[str, Any]:
        """That of the alarm."""
        return self._alarm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._alarm.load_state_dict(state)


class InputCurvature:
    """The top eigenvalue of the loss by the inputs, over the examples of a fixed batch: the
    sharpest of them.

    Args:
        model: left as found.
        batch: (inputs, targets).
        solve: finds the top eigenpair of an operator and returns its figures by name, "eigenvalue"
            among them.
        loss_fn: the loss trained on.

    Raises:
        HessianFlowError: inputs that are not one tensor.
    """

    kind = "input-curvature"

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        solve: Callable[[LinearOperator], Mapping[str, float]],
        loss_fn: LossFn = cross_entropy,
    ) -> None:
        check_one_tensor(batch[0])
        self._model, self._batch, self._solve, self._loss_fn = model, batch, solve, loss_fn

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return the figures; there is nothing to warn of."""
        return self._solve(InputHessian(self._model, *self._batch, self._loss_fn)), ""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""
