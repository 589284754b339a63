"""A batch size set by hand: sizes by epoch, the learning rate scaled with them and, if wanted, run
down to 0.

Ours: the plainest thing a controller that measures has to beat. Linear scaling is that of Goyal et
al., arXiv:1706.02677, section 2.1.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from hessianflow.control.checks import check_count, check_number
from hessianflow.control.controller import Controller, ControllerState, Measured
from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import Progress
from hessianflow.interfaces.errors import HessianFlowError


class TimedSchedule(Controller[ControllerState]):
    """Batch sizes by epoch, written down beforehand.

    From stage epoch e on: batch = its size, lr_factor = batch / batch_size, or what another rule
    makes of that ratio. With `decay_from` = d and E epochs in all, after t > d epochs, fractions of
    one included, the factor is multiplied by (E - t) / (E - d), changed after every update.

    Args:
        batch_size: examples per step at the start; the learning rate belongs to this size.
        stages: (epochs completed, batch size from then on), the epochs increasing, e.g.
            "[[2, 256], [4, 512]]"; the command takes, by default, 2, 4 and 8 times the batch after
            1/12, 1/6 and 1/3 of the epochs.
        decay_from: epochs after which the rate falls linearly, to 0 at the end of the run; use a
            constant schedule with it. None: it does not. With the command's own stages: after the
            last of them.
        lr_rule: how the rate follows the batch.
        max_lr_factor: cap of the learning-rate factor, before the decay.

    Raises:
        HessianFlowError: an argument is out of its bounds.
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
        self.decay_from = (
            None if decay_from is None else check_number("decay_from", decay_from, low=0)
        )
        self.initial_batch_size = batch_size
        self.lr_rule, self.max_lr_factor = lr_rule, max_lr_factor
        self._scale()  # checks the rule and the cap
        self.max_batch_size = max([batch_size, *(size for _, size in self.stages)])

    @classmethod
    def defaults(cls, run: RunFacts, options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return stages for the length of a run, and the decay that follows them."""
        if "stages" in options:
            return {}
        stages = {
            -(-run.epochs // part): min(factor * run.batch_size, run.max_batch_size)
            for part, factor in ((12, 2), (6, 4), (3, 8))
        }
        return {"stages": tuple(stages.items()), "decay_from": max(stages)}

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why the method does not go with a run."""
        if run.schedule == "cooldown":
            return "it decays by itself, use --controller.decay-from without --schedule cooldown"
        return ""

    def is_due(self, progress: Progress) -> bool:
        """After every epoch, and after every update while the rate falls."""
        return super().is_due(progress) or self._decay(progress) < 1

    def _decide(self, measured: Measured, /) -> str:
        progress, before = measured.progress, (self._state.batch_size, self._state.lr_factor)
        reached = [size for epoch, size in self.stages if epoch <= progress.epoch]
        self._state.batch_size = reached[-1] if reached else self.initial_batch_size
        self._state.lr_factor = self._scale() * self._decay(progress)
        if self._state.batch_size != before[0]:
            return f"planned for epoch {progress.epoch}"
        return (
            ""
            if self._state.lr_factor == before[1]
            else f"planned decay from epoch {self.decay_from} on"
        )

    def _scale(self) -> float:
        """Return what the rule makes of the batch in force."""
        state = self._state
        return lr_factor(
            state.batch_size, self.initial_batch_size, self.lr_rule, max_factor=self.max_lr_factor
        )

    def _decay(self, progress: Progress) -> float:
        """Return what is left of the rate, from 1 down to 0."""
        if self.decay_from is None or progress.total_epochs <= self.decay_from:
            return 1.0
        epochs = progress.examples / progress.examples_per_epoch
        return min(
            1.0,
            max(0.0, (progress.total_epochs - epochs) / (progress.total_epochs - self.decay_from)),
        )
