"""When a run saves checkpoints, and how many it keeps."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import checkpoints
from hessianflow.runs.names import CHECKPOINTS


class Saver:
    """Decides when a checkpoint is due within an epoch and writes checkpoints of a run.

    Args:
        every_examples: due after so many examples since the last one; None: never.
        every_minutes: due after so many minutes; None: never.
        keep: how many of the newest are kept.
    """

    def __init__(self, every_examples: int | None, every_minutes: float | None, keep: int) -> None:
        self._every_examples = every_examples
        self._every_minutes = every_minutes
        self._keep = keep
        self._time = time.monotonic()
        self._proven: set[str] = set()

    def is_due(self, examples_since: int) -> bool:
        """Return whether a checkpoint within the epoch is due by count, `examples_since` the last
        one."""
        return self._every_examples is not None and examples_since >= self._every_examples

    @property
    def time_is_up(self) -> bool:
        """Whether one is due by the clock of this process."""
        return (
            self._every_minutes is not None
            and time.monotonic() - self._time >= 60 * self._every_minutes
        )

    def restart_clock(self) -> None:
        """Note that a checkpoint is being made: the next is due by the clock so many minutes from
        now."""
        self._time = time.monotonic()

    def save(self, run_dir: Path, state: Mapping[str, Any], name: str) -> None:
        """Write `state` under `name` into the run's folder of checkpoints."""
        path = run_dir / CHECKPOINTS / name
        checkpoints.save(path, state, self._keep)
        # Better now than at a resume: something in the state, which fills with the first steps, may
        # be unreadable.
        stage = "filled" if state["updates"] > 0 else "new"
        if stage not in self._proven:
            self._proven.add(stage)
            try:
                checkpoints.load(path)
            except HessianFlowError as error:
                raise HessianFlowError(
                    "the state of this run cannot be kept: a part of it holds values other than"
                    f" tensors, numbers and strings ({error})"
                ) from None
