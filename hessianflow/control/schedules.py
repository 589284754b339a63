"""Controllers that follow a plan and measure nothing.

- :class:`FixedBatch` keeps one size throughout.
- :class:`Warmup`: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour",
  arXiv:1706.02677, sections 2.1 (linear scaling) and 2.2 (gradual warm-up).
- :class:`AdaBatch`: Devarakonda, Naumov, Garland, "AdaBatch: adaptive batch sizes for training deep
  neural networks", arXiv:1712.02029. Deviation: under a cap, the growth that the cap denies becomes
  decay of the learning rate, so that the rate per example falls as if there were no cap.
- :class:`GrowInsteadOfDecay`: Smith, Kindermans, Ying, Le, "Don't decay the learning rate, increase
  the batch size", ICLR 2018. Deviation: sizes are rounded down from the exact product, and the
  learning rate makes up for the rounding.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from hessianflow.checks import check_count, check_number
from hessianflow.control.checks import check_cap
from hessianflow.control.controller import Controller, ControllerState, Measured, grown
from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError


class FixedBatch(Controller[ControllerState]):
    """Keep the same batch size throughout.

    Args:
        batch_size: Examples per step.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(ControllerState(batch_size), batch_size)

    def is_due(self, progress: Progress) -> bool:  # noqa: ARG002
        """Return False, as there is nothing to decide."""
        return False

    def _decide(self, _measured: Measured, /) -> str:
        return ""


class Warmup(Controller[ControllerState]):
    """Use a large batch from the start and warm its learning rate up to the scaled one.

    With k = max_batch_size / batch_size and f = epochs passed / warmup_epochs, lr_factor is
    1 + (k - 1) * min(f, 1). The epochs passed include a fraction of the current one, so the factor
    changes after every update and no step sees a jump. A rule other than linear scaling replaces k.

    Args:
        batch_size: Batch size for which the learning rate is stated.
        max_batch_size: Examples per step throughout.
        warmup_epochs: Epochs over which the rate rises (5 in the paper). With 0 the rate is scaled
            from the first step on.
        lr_rule: Rule by which the learning rate follows the batch (linear in the paper).
        max_lr_factor: Cap on the factor of the learning rate; null stands for no cap.
    """

    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        warmup_epochs: float = 5,
        lr_rule: LRRule = "linear",
        max_lr_factor: float | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        check_cap(batch_size, max_batch_size)
        super().__init__(ControllerState(max_batch_size), max_batch_size)
        self.scale = lr_factor(max_batch_size, batch_size, lr_rule, max_factor=max_lr_factor)
        self.warmup_epochs = check_number("warmup_epochs", warmup_epochs, low=0)
        if warmup_epochs == 0:
            self._state.lr_factor = self.scale

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with a schedule that has a warm-up."""
        if run.warmup_epochs > 0:
            return (
                "--warmup-epochs is the ramp of the schedule, which would multiply this one: use"
                " --controller.warmup-epochs"
            )
        return ""

    def is_due(self, progress: Progress) -> bool:
        """Return whether an update was made before the full rate was reached."""
        return progress.examples > 0 and self._state.lr_factor != self.scale

    def _decide(self, measured: Measured, /) -> str:
        passed = measured.progress.epochs_passed
        factor = self.scale
        if passed < self.warmup_epochs:
            factor = 1 + (self.scale - 1) * (passed / self.warmup_epochs)
        if factor == self._state.lr_factor:
            return ""
        self._state.lr_factor = factor
        return f"warm-up: {passed:.4g} of {self.warmup_epochs:g} epochs"


class AdaBatch(Controller[ControllerState]):
    """Grow the batch and lower the learning rate every few epochs.

    At each event batch *= growth_factor (rounded down, capped) and lr_factor *= lr_decay. The rate
    per example falls by lr_decay / growth_factor. Where the cap limits the growth, the learning
    rate falls by the rest.

    Args:
        batch_size: Examples per step at the start.
        max_batch_size: Largest examples per step.
        every_epochs: Epochs between two events (20 in the paper).
        growth_factor: Factor by which the batch grows at each event (2 in the paper).
        lr_decay: Factor of the learning rate at each event (0.75 in the paper). With
            `growth_factor` 2 that matches a fixed batch whose rate is multiplied by 0.375.
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "constant"}

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        every_epochs: int = 20,
        growth_factor: float = 2,
        lr_decay: float = 0.75,
    ) -> None:
        super().__init__(ControllerState(batch_size), max_batch_size)
        self.every_epochs = check_count("every_epochs", every_epochs)
        self.growth_factor = check_number("growth_factor", growth_factor, above=1)
        self.lr_decay = check_number("lr_decay", lr_decay, above=0)

    def _decide(self, measured: Measured, /) -> str:
        state = self._state
        epoch = measured.progress.epoch
        if epoch % self.every_epochs != 0:
            return ""
        wanted = state.batch_size * self.growth_factor
        if state.batch_size < self.max_batch_size:
            state.batch_size = grown(state.batch_size, self.growth_factor, self.max_batch_size)
        decay = self.lr_decay
        if state.batch_size == self.max_batch_size:
            decay *= state.batch_size / wanted
        state.lr_factor *= decay
        return f"epoch {epoch} is a multiple of {self.every_epochs}"


class GrowInsteadOfDecay(Controller[ControllerState]):
    """Multiply the batch where a schedule would divide the learning rate.

    Once the cap is reached, the rate is divided. After i milestones, with B0 the first batch size,
    batch = min(cap, floor(B0 * decay_factor^i)) and lr_factor = batch / (B0 * decay_factor^i), so
    that rate over batch is that of the schedule replaced. Train with a constant learning rate,
    since a scheduler with the same milestones would decay twice.

    Args:
        batch_size: Examples per step at the start (B0).
        max_batch_size: Largest examples per step.
        milestones: Increasing epochs after which the schedule would divide the rate; the command
            takes those of the data set.
        decay_factor: Factor of the batch at each milestone, by which the schedule would divide the
            rate (alpha; 5 in the paper's CIFAR-10 runs).
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "constant"}

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        milestones: Sequence[int],
        decay_factor: float = 5,
    ) -> None:
        super().__init__(ControllerState(batch_size), max_batch_size)
        self.decay_factor = check_number("decay_factor", decay_factor, above=1)
        self.milestones = tuple(check_count("milestones", epoch) for epoch in milestones)
        if not self.milestones or any(b <= a for a, b in pairwise(self.milestones)):
            raise HessianFlowError(
                f"milestones must be one or more increasing epochs, got {list(milestones)}"
            )
        self.initial_batch_size = batch_size

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the epochs at which the data set's schedule would lower the rate."""
        return {"milestones": run.milestones}

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with a schedule."""
        if run.schedule != "constant":
            return f"it replaces --schedule {run.schedule}, leave that out"
        return ""

    def _decide(self, measured: Measured, /) -> str:
        state = self._state
        before = self.decision.setting
        passed = sum(epoch <= measured.progress.epoch for epoch in self.milestones)
        exact = self.initial_batch_size * self.decay_factor**passed
        state.batch_size = min(self.max_batch_size, int(exact + 1e-9))
        state.lr_factor = state.batch_size / exact
        if self.decision.setting == before:
            return ""
        return f"milestone {self.milestones[passed - 1]}: grow instead of decay"
