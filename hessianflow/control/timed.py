"""Batch sizes set by hand for given epochs.

The learning rate is scaled with them and can be run down to 0. The method is our own, as the
plainest baseline that a measuring controller has to beat. Linear scaling is that of Goyal et al.,
arXiv:1706.02677, section 2.1.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from hessianflow.checks import check_count
from hessianflow.control.checks import check_optional_number
from hessianflow.control.controller import Controller, ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError


class TimedSchedule(Controller[ControllerState]):
    """Set the batch sizes that were written down for given epochs.

    From the epoch of a stage on, batch is its size and lr_factor is batch / batch_size, or the
    factor of another rule. With `decay_from` = d and E epochs in all, the factor is multiplied by
    (E - t) / (E - d) after t > d epochs. There t may be a fraction: the factor changes after every
    update.

    Args:
        batch_size: Examples per step at the start. The learning rate is stated for this size.
        stages: Pairs of epochs completed, increasing, and batch size from then on, e.g.
            "[[2, 256], [4, 512]]". By default the command takes 2, 4 and 8 times the batch after
            1/12, 1/6 and 1/3 of the epochs.
        decay_from: Epochs after which the rate falls linearly, to 0 at the end of the run; null
            stands for never. It needs a constant schedule. With its own stages, the command takes
            the epoch of the last one.
        lr_rule: Rule by which the learning rate follows the batch.
        max_lr_factor: Cap on the factor of the learning rate before the decay; null stands for no
            cap.
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "constant"}
    follows_rule = True

    def __init__(
        self,
        batch_size: int,
        stages: Sequence[tuple[int, int]],
        *,
        decay_from: float | None = None,
        lr_rule: LRRule = "linear",
        max_lr_factor: float | None = None,
    ) -> None:
        super().__init__(ControllerState(batch_size), batch_size)
        self.stages = tuple(
            (check_count("stages epochs", e), check_count("stages sizes", b)) for e, b in stages
        )
        if any(later <= earlier for (earlier, _), (later, _) in pairwise(self.stages)):
            raise HessianFlowError(
                f"stages must have increasing epochs, got {[epoch for epoch, _ in self.stages]}"
            )
        self.decay_from = check_optional_number("decay_from", decay_from, low=0)
        self.initial_batch_size = batch_size
        self.lr_rule = lr_rule
        self.max_lr_factor = max_lr_factor
        self._scale()  # checks the rule and the cap
        self.max_batch_size = max([batch_size, *(size for _, size in self.stages)])

    @classmethod
    def defaults(cls, run: RunFacts, options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return stages for the length of the run, and the decay that follows them."""
        if "stages" in options:
            return {}
        stages = {
            -(-run.epochs // part): min(factor * run.batch_size, run.max_batch_size)
            for part, factor in ((12, 2), (6, 4), (3, 8))
        }
        return {"stages": tuple(stages.items()), "decay_from": max(stages)}

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with a schedule that decays at its end."""
        if run.schedule == "cooldown":
            return "it decays by itself, use --controller.decay-from without --schedule cooldown"
        return ""

    def is_due(self, progress: Progress) -> bool:
        """Return whether an epoch was completed, or the rate falls after every update."""
        return super().is_due(progress) or self._decay(progress) < 1

    def _decide(self, measured: Measured, /) -> str:
        state = self._state
        progress = measured.progress
        before = self.decision
        state.batch_size = self.initial_batch_size
        for epoch, size in self.stages:
            if epoch <= progress.epoch:
                state.batch_size = size
        state.lr_factor = self._scale() * self._decay(progress)
        if state.batch_size != before.batch_size:
            return f"planned for epoch {progress.epoch}"
        if state.lr_factor != before.lr_factor:
            return f"planned decay from epoch {self.decay_from} on"
        return ""

    def _scale(self) -> float:
        """Return the factor of the learning rate that the rule gives the batch in force."""
        state = self._state
        return lr_factor(
            state.batch_size, self.initial_batch_size, self.lr_rule, max_factor=self.max_lr_factor
        )

    def _decay(self, progress: Progress) -> float:
        """Return the factor of the decay, which falls from 1 to 0."""
        if self.decay_from is None:
            return 1.0
        total = progress.total_epochs
        if total is None:
            raise HessianFlowError(
                f"decay_from {self.decay_from} is an epoch, and the number of epochs of this run"
                " depends on later batch sizes: state the length of the run in epochs, or set"
                " decay_from to None"
            )
        if total <= self.decay_from:
            return 1.0
        left = (total - progress.epochs_passed) / (total - self.decay_from)
        return min(1.0, max(0.0, left))
