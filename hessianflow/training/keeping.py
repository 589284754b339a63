"""The state of a run, saved in checkpoints and restored from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.runs import checkpoints
from hessianflow.runs.names import CHECKPOINTS, LAST
from hessianflow.runs.optimizer_states import (
    OtherGroupsError,
    check_optimizer,
    in_order,
    keeping_options,
)
from hessianflow.runs.states import check_finite, check_training_state, model_fault, restoring
from hessianflow.training import checkpoint
from hessianflow.training.checkpoint import group_names
from hessianflow.training.optimizers import label
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState
from hessianflow.training.world import on_all_ranks, on_first_rank


@dataclass
class Keeper:
    """Saves the state of a run in its folder `run_dir` (None: nowhere), and puts it back."""

    run_dir: Path | None
    state: RunState
    saver: Saver

    def __post_init__(self) -> None:
        self.model = self.state.step.model
        self.ahead = self.state.ahead
        self.steering = self.state.steering
        self.world = self.steering.world
        self.course = self.steering.course
        self.record = self.steering.reporter.record

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
            on_first_rank(
                self.world, lambda: self.saver.save(folder, self.state_dict(generators), name)
            )

    def state_dict(self, generators: list[Any] | None = None) -> dict[str, Any]:
        """Return the state of the run, with the random generators of every rank."""
        return self.state.capture(self.record.sync(), generators)

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Put back :meth:`state_dict`, which errors call `source`."""
        self.forget_plans()
        self.steering.apply(self.state.restore(state, source, self.world.rank))

    def forget_plans(self) -> None:
        """Forget the queue and the work after the last update, when state or world change."""
        self.ahead.forget()
        self.course.forget()

    def restore_newest(self, history_bytes: Callable[[], int]) -> tuple[dict[str, Any], str | None]:
        """Restore `last.pt`, or set it aside where it is damaged and restore an older checkpoint.

        Rank 0 reads the files, because the other ranks need not see its disk. `history_bytes`
        returns the length of the history. The state restored is returned, with a warning when it
        was not the newest.

        Raises:
            HessianFlowError: no checkpoint can be restored; it says what is wrong with the newest.
        """
        assert self.run_dir is not None
        folder = self.run_dir / CHECKPOINTS
        source = f"the checkpoint in {self.run_dir}"
        refused: dict[str, str] = {}

        def attempt() -> tuple[dict[str, Any], str, str | None]:
            return checkpoints.load_newest(folder, history_bytes(), self._check_fits, refused)

        while True:
            state, name, warning = on_first_rank(self.world, attempt)
            damage = on_all_ranks(self.world, partial(self._damage_of, state, source))
            damages = [text for text in self.world.gather(damage) if text is not None]
            if not damages:
                break
            refused[name] = damages[0]
        if warning is not None:
            on_first_rank(self.world, lambda: checkpoints.set_aside(folder))
        return state, warning

    def _damage_of(self, state: Mapping[str, Any], source: str) -> str | None:
        """Put back a state, and return why that is impossible; None where it succeeded."""
        try:
            with restoring(source), keeping_options(self.state.optimizer):
                self.load_state_dict(state, source)
        except HessianFlowError as error:  # Older states of another run will be refused alike.
            return str(error)
        return None

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a checkpoint that is damaged, or of another model."""
        check_training_state(state)
        inner = unwrap(self.model)
        own = inner.state_dict()
        # The first forward pass may make buffers; restoring the model handles names that differ.
        shared = {name: value for name, value in state["model"].items() if name in own}
        fault = model_fault(inner, {**own, **shared})
        if fault is not None:
            raise HessianFlowError(f"it is of another model: {fault}")
        check_finite(inner, shared)
        optimizer = self.state.optimizer
        if state["optimizer_class"] == label(optimizer):
            try:
                saved = in_order(state["optimizer"], state["groups"], group_names(inner, optimizer))
            except OtherGroupsError:
                return  # This is the state of another run: restoring it reports that.
            check_optimizer(optimizer, saved)
