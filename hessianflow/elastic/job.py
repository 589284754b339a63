"""A trainer as an elastic job, which trains in stretches, as any rank of any world."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hessianflow.distributed import GroupReducer, GroupWorld, LocalReducer
from hessianflow.elastic.member import JobReport
from hessianflow.interfaces import HessianFlowError, World
from hessianflow.training import AdaptiveBatchTrainer
from hessianflow.training.state import separate_generators


class TrainerJob:
    """The trainer of one rank as a :class:`hessianflow.elastic.ElasticJob`.

    All ranks keep the same records, so that any of them can continue as the first. When an update
    was interrupted, its batch is trained again: the position in the data is that of the last
    complete update. (Running statistics of batch normalisation and random starts of attacks may
    have seen the interrupted batch twice.)

    Args:
        make: Function that builds the trainer for a world, without a run directory; the process
            that starts the run keeps the records.

    Raises:
        HessianFlowError: The adversary has a staleness, whose batches would be drawn twice, or the
            length of the run is not stated in passes over the data.
    """

    def __init__(self, make: Callable[[World], AdaptiveBatchTrainer]) -> None:
        self._world = GroupWorld(LocalReducer())
        self._trainer = make(self._world)
        adversary = self._trainer.adversary
        if adversary is not None and adversary.staleness > 0:
            raise HessianFlowError(
                "staleness must be 0 in an elastic run, whose workers hold no batches for later,"
                f" got {adversary.staleness}: use --adversary.staleness 0, or train without"
                " --elastic"
            )
        if not self._trainer.counts_passes:
            raise HessianFlowError(
                "an elastic run counts whole passes over the data: give its trainer epochs, and"
                " leave out max_updates, max_examples and every"
            )
        self._trainer.begin()
        self._copied = False

    @property
    def waited_seconds(self) -> float:
        """Return the time spent waiting for other ranks."""
        return self._world.waited_seconds

    def join(self, reducer: GroupReducer) -> None:
        """Become a rank of a world, at the first example that no complete update has used."""
        self._world.rejoin(reducer)
        self._trainer.rejoin()
        data = self._trainer.train_data
        progress = self._trainer.progress
        epoch, cursor = divmod(progress.examples, progress.examples_per_epoch)
        data.load_state_dict({**data.state_dict(), "epoch": epoch, "cursor": cursor})
        if self._copied:
            separate_generators(reducer.rank)
            self._copied = False

    def run_until(self, updates: int) -> JobReport:
        """Train until `updates` updates have been made, or to the end of the epoch."""
        self._trainer.run_until(min(updates, self._last_of_epoch()))
        return self.report()

    def report(self) -> JobReport:
        """Return the progress of the job, without training."""
        trainer = self._trainer
        progress = trainer.progress
        done = progress.is_over and trainer.is_settled
        at_end = progress.examples % progress.examples_per_epoch == 0
        sizes = (trainer.decision.batch_size, trainer.microbatch_size)
        made = len(trainer.records)
        return JobReport(progress.updates, progress.examples, *sizes, done, made, at_end)

    def rows(self, start: int) -> Sequence[Mapping[str, Any]]:
        """Return the records from number `start` on."""
        return list(self._trainer.records[start:])

    def describe(self) -> Mapping[str, Any]:
        """Return the facts about the trainer for config.json and summary.json."""
        return {"trainer": self._trainer.settings(), "summary": self._trainer.summary()}

    def state(self) -> dict[str, Any]:
        """Return a checkpoint of the trainer and the records."""
        return {"trainer": self._trainer.state_dict(), "rows": list(self._trainer.records)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint and records."""
        self._trainer.load_state_dict(state["trainer"])
        self._trainer.records[:] = state["rows"]
        self._copied = True

    def _last_of_epoch(self) -> int:
        """Return the number of the update that ends the epoch if the batch size stays."""
        progress = self._trainer.progress
        batch = self._trainer.decision.batch_size
        left = progress.examples_per_epoch - progress.examples % progress.examples_per_epoch
        if left > batch > 1 and left % batch == 1:  # a single example joins the batch before it
            return progress.updates + left // batch
        return progress.updates + math.ceil(left / batch)
