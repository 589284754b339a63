"""ABSA: adaptive batch size driven by the Hessian's top eigenvalue, with adversarial training.

Yao, Gholami, Arfeen, Liaw, Gonzalez, Keutzer, Mahoney, "Large batch size training of neural
networks with adversarial training and second-order information", arXiv:1810.01021.

Once per epoch, with lambda the top eigenvalue of the Hessian of the training loss:

1. The first usable lambda becomes the reference. Later, if lambda <= reference / decay_factor: the
   reference becomes lambda, GROW.
2. Otherwise, if this is the `patience`-th estimate since the last growth: GROW, the reference
   unchanged.
3. From half of the epochs on: adversarial share = 0.

GROW: batch = floor(growth_factor * batch), at most the cap; the learning rate times the ratio of
the batches; the adversarial share divided by share_decay, and 0 at the cap. The share itself is the
adversary's (gamma; 0.2 in the published code): the controller multiplies it by a factor that begins
at 1. ABS is the method without an adversary.

Deviations from the published code:

- a reading that is missing, not finite, <= 0, not converged or not reliable counts towards the
  patience but is never compared, nor taken as the reference (there, a negative estimate makes the
  test true for ever, a NaN as the first one never, and estimates of 10^9 to 10^3 under running
  statistics that had not settled drove one growth after another);
- decay, growth and share factors are three settings instead of one, and the patience is a setting;
- sizes count examples, not microbatches, so that any cap is possible; a growth adds at least one
  example.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hessianflow.control.checks import check_count, check_number
from hessianflow.control.controller import Controller, ControllerState, Measured, grown
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import CurvatureReading, Progress


@dataclass
class ABSAState(ControllerState):
    """Adds the reference eigenvalue (None until one was usable) and the estimates since the last
    growth."""

    reference: float | None = None
    estimates: int = 0


class ABSA(Controller[ABSAState]):
    """Grow the batch when the top Hessian eigenvalue has fallen, or when it has not for long.

    Args:
        batch_size: examples per step at the start; the learning rate belongs to this size.
        max_batch_size: the cap. Equal to `batch_size`: the batch never grows and no eigenvalue is
            asked for.
        decay_factor: the eigenvalue must fall to reference / decay_factor (alpha; 2 in the
            published code).
        growth_factor: the batch grows by this factor (beta; 2 in the published code).
        patience: estimates without a growth before one is forced (kappa; 10 in the published code).
            None: never.
        share_decay: divides the adversarial share at each growth (omega; 2 in the published code).
        total_epochs: epochs of the run, at half of which (rounded down) the share becomes 0. None:
            as `progress` says.

    Raises:
        HessianFlowError: an argument is out of its bounds.
    """

    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        decay_factor: float = 2,
        growth_factor: float = 2,
        patience: int | None = 10,
        share_decay: float = 2,
        total_epochs: int | None = None,
    ) -> None:
        super().__init__(ABSAState(batch_size), max_batch_size)
        self.decay_factor = check_number("decay_factor", decay_factor, above=1)
        self.growth_factor = check_number("growth_factor", growth_factor, above=1)
        self.patience = None if patience is None else check_count("patience", patience)
        self.share_decay = check_number("share_decay", share_decay, low=1)
        self.total_epochs = (
            None if total_epochs is None else check_count("total_epochs", total_epochs)
        )
        self.initial_batch_size = batch_size

    @property
    def needs(self) -> frozenset[str]:
        """The eigenvalue while the batch can still grow, then nothing."""
        return frozenset({"eigenvalue"} if self._can_grow else ())

    def forget_reference(self) -> None:
        """The next usable eigenvalue becomes the reference: the loss is another one from here
        on."""
        self._state.reference = None

    def _decide(self, measured: Measured, /) -> str:
        reasons = self._consider_growth(measured.reading) if self._can_grow else []
        return "; ".join(reasons + self._consider_half_way(measured.progress))

    @property
    def _can_grow(self) -> bool:
        return self._state.batch_size < self.max_batch_size

    def _consider_growth(self, reading: CurvatureReading | None) -> list[str]:
        state = self._state
        state.estimates += 1
        defect = _defect(reading)
        reasons = [f"eigenvalue not used: {defect}"] if defect else []
        if reading is not None and not defect:
            if state.reference is None:
                state.reference = reading.eigenvalue
            elif reading.eigenvalue <= state.reference / self.decay_factor:
                fall = f"eigenvalue fell from {state.reference:.4g} to {reading.eigenvalue:.4g}"
                state.reference = reading.eigenvalue
                self._grow()
                return [f"{fall} (<= 1/{self.decay_factor:g})"]
        if self.patience is not None and state.estimates >= self.patience:
            word = "estimate" if state.estimates == 1 else "estimates"
            reasons.append(f"no growth for {state.estimates} {word}")
            self._grow()
        return reasons

    def _grow(self) -> None:
        state = self._state
        state.batch_size = grown(state.batch_size, self.growth_factor, self.max_batch_size)
        state.lr_factor = state.batch_size / self.initial_batch_size
        state.attack_factor = state.attack_factor / self.share_decay if self._can_grow else 0.0
        state.estimates = 0

    def _consider_half_way(self, progress: Progress) -> list[str]:
        total = self.total_epochs or progress.total_epochs
        if self._state.attack_factor == 0 or progress.epoch < total // 2:
            return []
        self._state.attack_factor = 0.0
        return [f"adversarial share 0 from half of the {total} epochs on"]


class ABS(ABSA):
    """ABSA without an adversary: its rule for the batch size alone.

    The arguments are those of :class:`ABSA` that have to do with the batch. An adversary in the
    same run attacks nothing.
    """

    prefers: ClassVar[Mapping[str, str]] = {"adversary": "none"}

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        decay_factor: float = 2,
        growth_factor: float = 2,
        patience: int | None = 10,
    ) -> None:
        super().__init__(
            batch_size,
            max_batch_size,
            decay_factor=decay_factor,
            growth_factor=growth_factor,
            patience=patience,
        )
        self._state.attack_factor = 0.0

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with a run."""
        if run.adversary != "none":
            return f"it trains clean, leave --adversary {run.adversary} out or use absa"
        return ""


def _defect(reading: CurvatureReading | None) -> str:
    """Return what makes a reading unfit for a comparison; empty for a fit one."""
    if reading is None:
        return "no reading"
    if not math.isfinite(reading.eigenvalue):
        return f"not finite ({reading.eigenvalue})"
    if reading.eigenvalue <= 0:
        return f"not positive ({reading.eigenvalue:.4g})"
    if not reading.reliable:
        return f"on running statistics that have not settled ({reading.eigenvalue:.4g})"
    if not reading.converged:
        return f"not converged ({reading.eigenvalue:.4g}, residual {reading.residual:.2g})"
    return ""
