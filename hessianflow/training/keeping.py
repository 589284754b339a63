"""The state of a run, kept in checkpoints and brought back from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hessianflow.interfaces import World
from hessianflow.runs import Recorder
from hessianflow.runs.names import LAST
from hessianflow.training import checkpoint
from hessianflow.training.course import Course
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.restore import restore_newest
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState
from hessianflow.training.steering import Steering
from hessianflow.training.world import on_first_rank


@dataclass
class Keeper:
    """Saves the state of a run, and puts it back.

    Attributes:
        run_dir: folder of the run, on all ranks; None: nothing is written.
        model: checked against the weights of a checkpoint.
        state: everything a checkpoint holds.
        saver: knows when to save, and how.
        ahead: forgets what was drawn ahead when another state is put back.
        steering: applies the decision of that state.
        world: the ranks that save together; rank 0 alone writes.
    """

    run_dir: Path | None
    model: nn.Module
    state: RunState
    saver: Saver
    ahead: Lookahead
    steering: Steering
    world: World

    @property
    def course(self) -> Course:
        """How far the run has come."""
        return self.steering.course

    @property
    def record(self) -> Recorder:
        """The records of the run, which know the length of the history."""
        return self.steering.reporter.record

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due by the number of examples since the last one."""
        counters = self.course.counters
        return self.saver.is_due(counters.examples - counters.saved_at)

    @property
    def time_is_up(self) -> bool:
        """Whether a checkpoint is due by the clock of this process."""
        return self.saver.time_is_up

    def save(self, name: str = LAST) -> None:
        """Write a checkpoint, if the run has a folder; what all ranks share is rank 0's."""
        if name == LAST:
            self.course.counters.saved_at = self.course.counters.examples
        self.saver.restart_clock()  # on every rank, for any of them may find that time is up
        folder = self.run_dir
        if folder is None:
            return
        with self.state.stopwatch.section("checkpoint"):
            generators = self.world.gather(checkpoint.generator_states())

            def save() -> None:
                self.saver.save(folder, self.state_dict(generators), name)

            on_first_rank(self.world, save)

    def state_dict(self, generators: list[Any] | None = None) -> dict[str, Any]:
        """Return everything a run needs to continue as if it had never stopped: tensors and plain
        values.

        Args:
            generators: the states of every rank's random generators; None: those of this rank stand
                for all.
        """
        return self.state.capture(self.steering.decision, self.record.sync(), generators)

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Continue from :meth:`state_dict`; `source` names it in errors."""
        self.forget_plans()
        self.steering.apply(self.state.restore(state, source, self.world.rank))

    def forget_plans(self) -> None:
        """Forget what was drawn ahead, and what was done after the last update: the state or the
        world is another."""
        self.ahead.forget()
        self.course.forget()

    def restore_newest(self, history_bytes: Callable[[], int]) -> tuple[dict[str, Any], str | None]:
        """Put back the newest checkpoint that can be; returns it, and a warning where it is not the
        last."""
        assert self.run_dir is not None
        return restore_newest(
            self.world,
            self.run_dir,
            history_bytes,
            self.load_state_dict,
            self.model,
            self.state.optimizer,
        )
