"""The state of a run, saved in checkpoints and restored from them."""

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
        """Progress of the run."""
        return self.steering.course

    @property
    def record(self) -> Recorder:
        """Records of the run."""
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
        """Write a checkpoint on rank 0, if the run has a folder."""
        if name == LAST:
            self.course.counters.saved_at = self.course.counters.examples
        self.saver.restart_clock()  # On every rank, because the clock of each may ask to save.
        folder = self.run_dir
        if folder is None:
            return
        with self.state.stopwatch.section("checkpoint"):
            generators = self.world.gather(checkpoint.generator_states())

            def save() -> None:
                self.saver.save(folder, self.state_dict(generators), name)

            on_first_rank(self.world, save)

    def state_dict(self, generators: list[Any] | None = None) -> dict[str, Any]:
        """Return the state of the run as tensors and plain values, complete for a restart.

        Args:
            generators: the states of every rank's random generators; None: those of this rank stand
                for all.
        """
        return self.state.capture(self.steering.decision, self.record.sync(), generators)

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Put back :meth:`state_dict`, which errors call `source`."""
        self.forget_plans()
        self.steering.apply(self.state.restore(state, source, self.world.rank))

    def forget_plans(self) -> None:
        """Forget the queue and the work after the last update, when state or world change."""
        self.ahead.forget()
        self.course.forget()

    def restore_newest(self, history_bytes: Callable[[], int]) -> tuple[dict[str, Any], str | None]:
        """Put back the newest usable checkpoint, and return it, with a warning if it is an older
        one."""
        assert self.run_dir is not None
        return restore_newest(
            self.world,
            self.run_dir,
            history_bytes,
            self.load_state_dict,
            self.model,
            self.state.optimizer,
        )
