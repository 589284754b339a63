"""ABSA: adaptive batch size driven by the Hessian's top eigenvalue, with adversarial training.

Yao, Gholami, Arfeen, Liaw, Gonzalez, Keutzer, Mahoney, "Large batch size training of neural
networks with adversarial training and second-order information", arXiv:1810.01021.

Once per epoch the method reads lambda, the top eigenvalue of the Hessian of the training loss:

1. The first usable lambda becomes the reference. When a later lambda <= reference / decay_factor,
   lambda becomes the reference and the batch grows.
2. Otherwise the batch grows at the `patience`-th estimate since the last growth, and the reference
   stays.
3. From half of the epochs on, the adversarial share is 0.

A growth makes the batch floor(growth_factor * batch), at most the cap. It multiplies the learning
rate by the ratio of the batches and divides the adversarial share by share_decay; at the cap the
share is 0. The share itself is the adversary's (gamma; 0.2 in the published code): the controller
multiplies it by a factor that begins at 1. ABS is the method without an adversary.

Deviations from the published code:

- A reading that is missing, not of the Hessian itself, not finite, <= 0, not converged or not
  reliable counts towards the patience but is neither compared nor taken as the reference. In the
  published code a negative estimate makes the test true for ever and a NaN as the first one makes
  it false for ever, and estimates that fell from 10^9 to 10^3, under running statistics that had
  not settled, drove one growth after another.
- The factors of decay, growth and share are three settings instead of one, and the patience is a
  setting.
- Sizes count examples, not microbatches, so that any cap is possible. A growth adds at least one
  example.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hessianflow.checks import check_number
from hessianflow.control.checks import check_optional_count
from hessianflow.control.controller import Controller, ControllerState, Measured, grown
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import HESSIAN, CurvatureReading, Progress


@dataclass
class ABSAState(ControllerState):
    """Adds the reference eigenvalue, None until one was usable, and estimates since a growth."""

    reference: float | None = None
    estimates: int = 0


class ABSA(Controller[ABSAState]):
    """Grow the batch when the top Hessian eigenvalue has fallen, or has not fallen for long.

    Args:
        batch_size: Examples per step at the start. The learning rate is stated for this size.
        max_batch_size: Largest examples per step. If it equals `batch_size`, the batch never grows
            and no eigenvalue is asked for.
        decay_factor: Factor by which the eigenvalue must fall below the reference before the batch
            grows (alpha; 2 in the published code).
        growth_factor: Factor by which the batch grows (beta; 2 in the published code).
        patience: Estimates without a growth after which one is forced (kappa; 10 in the published
            code); null stands for never.
        share_decay: Divisor of the adversarial share at each growth (omega; 2 in the published
            code).
        total_epochs: Epochs of the run, at half of which (rounded down) the adversarial share
            becomes 0; null stands for the number that is planned.
    """

    follows_rule = True
    reads_hessian = True

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
        self.patience = check_optional_count("patience", patience)
        self.share_decay = check_number("share_decay", share_decay, low=1)
        self.total_epochs = check_optional_count("total_epochs", total_epochs)
        self.initial_batch_size = batch_size

    @property
    def needs(self) -> frozenset[str]:
        """Name the eigenvalue while the batch can still grow, then nothing."""
        if self._can_grow:
            return frozenset({"eigenvalue"})
        return frozenset()

    def forget_reference(self) -> None:
        """Let the next usable eigenvalue be the reference, because the loss changes here."""
        self._state.reference = None

    def _decide(self, measured: Measured, /) -> str:
        reasons = self._consider_growth(measured.reading)
        return "; ".join(reasons + self._consider_half_way(measured.progress))

    @property
    def _can_grow(self) -> bool:
        return self._state.batch_size < self.max_batch_size

    def _consider_growth(self, reading: CurvatureReading | None) -> list[str]:
        if not self._can_grow:
            return []
        state = self._state
        state.estimates += 1
        reasons = []
        defect = _defect(reading)
        if reading is None or defect:
            reasons.append(f"eigenvalue not used: {defect}")
        elif fall := self._compare(reading.eigenvalue):
            self._grow()
            return [fall]
        if self.patience is not None and state.estimates >= self.patience:
            word = "estimate" if state.estimates == 1 else "estimates"
            reasons.append(f"no growth for {state.estimates} {word}")
            self._grow()
        return reasons

    def _compare(self, eigenvalue: float) -> str:
        """Return the fall of the eigenvalue, or an empty string if it fell too little."""
        reference = self._state.reference
        if reference is None:
            self._state.reference = eigenvalue
            return ""
        if eigenvalue > reference / self.decay_factor:
            return ""
        self._state.reference = eigenvalue
        return (
            f"eigenvalue fell from {reference:.4g} to {eigenvalue:.4g} (<= 1/{self.decay_factor:g})"
        )

    def _grow(self) -> None:
        state = self._state
        state.batch_size = grown(state.batch_size, self.growth_factor, self.max_batch_size)
        state.lr_factor = state.batch_size / self.initial_batch_size
        state.attack_factor /= self.share_decay
        if not self._can_grow:
            state.attack_factor = 0.0
        state.estimates = 0

    def _consider_half_way(self, progress: Progress) -> list[str]:
        total = self.total_epochs or progress.total_epochs
        if total is None:
            is_past = progress.fraction >= 0.5
            length = "run"
        else:
            is_past = progress.epoch >= total // 2
            length = f"{total} epochs"
        if self._state.attack_factor == 0 or not is_past:
            return []
        self._state.attack_factor = 0.0
        return [f"adversarial share 0 from half of the {length} on"]


class ABS(ABSA):
    """ABSA without an adversary, which is its rule for the batch size alone.

    The arguments are those of :class:`ABSA` that concern the batch. An adversary in the same run
    attacks nothing.
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
        factors: dict[str, Any] = {"decay_factor": decay_factor, "growth_factor": growth_factor}
        super().__init__(batch_size, max_batch_size, patience=patience, **factors)
        self._state.attack_factor = 0.0

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with an adversary."""
        if run.adversary != "none":
            return f"it trains on clean examples, leave --adversary {run.adversary} out or use absa"
        return ""


def _defect(reading: CurvatureReading | None) -> str:
    """Return what makes a reading unfit for a comparison, or an empty string."""
    if reading is None:
        return "no reading"
    if reading.matrix != HESSIAN:
        return f"that of the {reading.matrix}"
    if not math.isfinite(reading.eigenvalue):
        return f"not finite ({reading.eigenvalue})"
    if reading.eigenvalue <= 0:
        return f"not positive ({reading.eigenvalue:.4g})"
    if not reading.reliable:
        return f"on running statistics that have not settled ({reading.eigenvalue:.4g})"
    if not reading.converged:
        return f"not converged ({reading.eigenvalue:.4g}, residual {reading.residual:.2g})"
    return ""
