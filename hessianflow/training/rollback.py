"""The response to a divergence: the run stops, or goes back to its last checkpoint."""

import math
from dataclasses import dataclass

from hessianflow.runs import rows
from hessianflow.training.divergence import Divergence, DivergenceError, largest, rate_rule
from hessianflow.training.keeping import Keeper
from hessianflow.training.world import on_first_rank


@dataclass
class Guard:
    """Looks for a divergence on any rank, and rolls back if the settings ask for it."""

    divergence: Divergence
    keeper: Keeper

    def __post_init__(self) -> None:
        self.course = self.keeper.course
        self.steering = self.keeper.steering
        self.trained = self.steering.step.trained
        self.stopwatch = self.steering.stopwatch
        self.reporter = self.steering.reporter
        self.totals = self.steering.totals
        self.world = self.keeper.world

    def begin(self) -> None:
        """Note the size of the weights, and which buffers are finite, before any training."""
        # Other buffers, such as an attention mask, may hold infinities on purpose.
        buffers = self.keeper.model.buffers()
        self._buffers = [buffer for buffer in buffers if math.isfinite(largest([buffer]))]
        self._largest = largest(self.trained.current)

    def check(self, *, at_end: bool) -> None:
        """Refuse to continue if losses (`at_end` also their mean), weights or buffers diverged."""
        first_bad = self.totals.first_bad_update(at_end=at_end)
        weight = largest(self.trained.current)
        if first_bad is None and not math.isfinite(weight + largest(self._buffers)):
            first_bad = self.course.counters.updates
        if first_bad is None:
            first_bad = self.totals.weights_grew(weight / max(self._largest, 1.0))
            self._largest = weight
        every = self.world.gather(first_bad)
        self._refuse(min((update for update in every if update is not None), default=None))

    def check_losses(self) -> None:
        """Refuse to continue if the losses, which are alike on all ranks, diverged."""
        self._refuse(self.totals.first_bad_update())

    def roll_back(self, error: DivergenceError) -> None:
        """Go back to the last checkpoint and undo the last growth; raise `error` if impossible."""
        steering = self.steering
        counters = self.course.counters
        history = self.reporter.record.history()
        cap = self.world.broadcast(
            self.divergence.cap(history.growths, counters.rollbacks, counters.batch_cap)
        )
        if cap is None:
            raise error
        power, factor = on_first_rank(self.world, lambda: rate_rule(history.of_kind("batch")))
        rollbacks = counters.rollbacks + 1
        seconds = self.stopwatch.totals()
        _, warning = self.keeper.restore_newest(self.reporter.record.sync)
        self.stopwatch.load(seconds)  # The time since the checkpoint was spent too.
        self.totals.forget_divergence()
        if warning is not None:
            self.reporter.event("fallback", warning)
        counters = self.course.counters
        counters.rollbacks = rollbacks
        counters.batch_cap = cap
        counters.cap_power = power
        counters.cap_factor = factor
        self.reporter.bar.move_to(self.course.progress)
        self.reporter.event(
            "rollback", f"back to {counters.examples} examples; batch held at {cap} from now on"
        )
        self.keeper.ahead.revise(steering.held)
        held = steering.held(steering.decision)
        progress = self.course.progress
        share = steering.share(held)
        self.reporter.record.write(rows.decision_row(progress, steering.decision, held, share))
        steering.apply(held)

    def _refuse(self, update: int | None) -> None:
        """Record and raise that training diverged at `update`; None: it did not."""
        if update is None:
            return
        counters = self.course.counters
        steering = self.steering
        where = (
            "the training loss or a weight was not finite, or exploded, in epoch"
            f" {counters.epoch + (counters.place > 0)} at update {update}"
        )
        self.reporter.event("diverged", where)
        kept = self.world.broadcast(self.reporter.record.last_checkpoint())
        raise DivergenceError(
            f"{where} (learning rate {steering.rate.value:g}, batch"
            f" {steering.decision.batch_size}): lower the rate or the largest batch, or, if the"
            f" loss was finite and right, set Divergence(max_loss_ratio=None); {kept}"
        )
