"""A trainer as an elastic job: it trains stretch by stretch, as any rank of any world, and hands on
its state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hessianflow.distributed import GroupReducer, GroupWorld, LocalReducer
from hessianflow.elastic.member import JobReport
from hessianflow.interfaces import HessianFlowError, World
from hessianflow.training import AdaptiveBatchTrainer
from hessianflow.training.state import separate_generators


class TrainerJob:
    """One rank's trainer; see :class:`hessianflow.elastic.ElasticJob`.

    All ranks keep the same records, so that any of them can go on as the first. When an update was
    interrupted, its batch is trained again: the place in the data is that of the last complete
    update. (Running statistics of batch normalisation and random starts of attacks may have seen
    the interrupted batch twice.)

    Args:
        make: builds the trainer for a world, without a run directory; the records are kept by
            whoever runs the job.

    Raises:
        HessianFlowError: an adversary with a staleness: batches drawn ahead would be drawn anew in
            another world.
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
        self._trainer.begin()
        self._copied = False

    @property
    def waited_seconds(self) -> float:
        """Time spent waiting for other ranks."""
        return self._world.waited_seconds

    def join(self, reducer: GroupReducer) -> None:
        """Take a place in a world, at the first example that no complete update has used."""
        self._world.rejoin(reducer)
        self._trainer.rejoin()
        data, progress = self._trainer.train_data, self._trainer.progress
        epoch, cursor = divmod(progress.examples, progress.examples_per_epoch)
        data.load_state_dict({**data.state_dict(), "epoch": epoch, "cursor": cursor})
        if self._copied:
            separate_generators(reducer.rank)
            self._copied = False

    def run_until(self, updates: int) -> JobReport:
        """Train until so many updates, or to the end of the epoch."""
        self._trainer.run_until(min(updates, self._last_of_epoch()))
        return self.report()

    def report(self) -> JobReport:
        """Without training."""
        trainer, progress = self._trainer, self._trainer.progress
        done = progress.epoch >= progress.total_epochs and trainer.is_settled
        at_end = progress.examples % progress.examples_per_epoch == 0
        return JobReport(
            progress.updates,
            progress.examples,
            trainer.decision.batch_size,
            trainer.microbatch_size,
            done,
            len(trainer.records),
            at_end,
        )

    def rows(self, start: int) -> Sequence[Mapping[str, Any]]:
        """The records from number `start` on."""
        return list(self._trainer.records[start:])

    def describe(self) -> Mapping[str, Any]:
        """What config.json and summary.json hold of the trainer."""
        return {"trainer": self._trainer.settings(), "summary": self._trainer.summary()}

    def state(self) -> dict[str, Any]:
        """A checkpoint, and the records."""
        return {"trainer": self._trainer.state_dict(), "rows": list(self._trainer.records)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        self._trainer.load_state_dict(state["trainer"])
        self._trainer.records[:] = state["rows"]
        self._copied = True

    def _last_of_epoch(self) -> int:
        """The update that ends the epoch, if the batch stays; a single example left over joins the
        batch before it."""
        progress, batch = self._trainer.progress, self._trainer.decision.batch_size
        left = progress.examples_per_epoch - progress.examples % progress.examples_per_epoch
        alone = left > batch > 1 and left % batch == 1
        return progress.updates + (left // batch if alone else -(-left // batch))
