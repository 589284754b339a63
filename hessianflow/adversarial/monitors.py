"""Measurements of robustness after each epoch (:class:`interfaces.EpochMeasurement`)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.attacks import fgsm, pgd
from hessianflow.adversarial.budget import PerChannel, ValueRange, check_one_tensor
from hessianflow.adversarial.input_hessian import InputHessian
from hessianflow.adversarial.robustness import Attack, OverfittingAlarm, robust_accuracy
from hessianflow.interfaces import LinearOperator, LossFn

PGD_STEPS = 10
"""Steps of the measured PGD. This default is our choice: they suffice to see a collapse, which Wong
et al., arXiv 2001.03994, see with few steps on one batch."""


class RobustnessWatch:
    """Measure accuracy under FGSM and PGD on a fixed batch, and warn of catastrophic overfitting.

    Args:
        model: Model to attack, which is left unchanged.
        batch: Inputs and targets of held-out examples.
        eps: Size of both attacks, as in :func:`attacks.fgsm`.
        value_range: Smallest and largest valid value; None stands for no clamping.
        collapse: Share of the best PGD accuracy below which it counts as collapsed, see
            :class:`robustness.OverfittingAlarm`.
        seed: Seed of PGD's random start, which is the same after every epoch.

    Raises:
        HessianFlowError: collapse is outside (0, 1), or the inputs are not one tensor.
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
        self._model = model
        self._batch = batch
        self._seed = seed
        self._eps = eps
        self._range = value_range
        self._alarm = OverfittingAlarm(collapse)

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return the accuracies, and the reason of an alarm or an empty string."""
        source = torch.Generator(device=self._batch[0].device).manual_seed(self._seed)
        common: dict[str, Any] = {"eps": self._eps, "value_range": self._range}
        attacks: dict[str, Attack] = {
            "fgsm": partial(fgsm, **common),
            "pgd": partial(pgd, **common, steps=PGD_STEPS, generator=source),
        }
        accuracy = robust_accuracy(self._model, self._batch, attacks)
        figures = {f"{name}_accuracy": accuracy[name].value for name in attacks}
        return figures, self._alarm.update(accuracy["fgsm"].value, accuracy["pgd"].value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the alarm."""
        return self._alarm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._alarm.load_state_dict(state)


class InputCurvature:
    """Measure the top eigenvalue of the input Hessian over the examples of a fixed batch.

    Args:
        model: Model to measure, which is left unchanged.
        batch: Inputs and targets.
        solve: Function that finds the top eigenpair of an operator and returns its figures by name,
            among them "eigenvalue".
        loss_fn: Training loss.
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
        self._model = model
        self._batch = batch
        self._solve = solve
        self._loss_fn = loss_fn

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return the figures and an empty string, as there is nothing to warn of."""
        return self._solve(InputHessian(self._model, *self._batch, self._loss_fn)), ""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, as nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, as nothing is remembered."""
