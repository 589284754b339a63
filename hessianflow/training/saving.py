"""The settings of checkpoints, and the writing of them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hessianflow.checks import check_count, check_limit
from hessianflow.interfaces import HessianFlowError, Stateful
from hessianflow.runs import checkpoints
from hessianflow.runs.names import CHECKPOINTS
from hessianflow.training.checks import check_parts
from hessianflow.training.course import Counters


@dataclass(frozen=True)
class Checkpoints:
    """Settings of checkpoints, which are saved at the end of every epoch.

    Attributes:
        every_examples: also each time this many examples have been trained; None: never.
        every_minutes: also each time this many minutes have passed; None: never.
        keep: how many of the newest are kept (the best one is kept as well).
        state: by name, other objects whose state every checkpoint is to hold, such as an average of
            the weights (`torch.optim.swa_utils.AveragedModel`) or a generator in a class of its
            own. Their `state_dict` and `load_state_dict` must deal in tensors and plain values. The
            trainer itself saves model, optimizer, scheduler, data, controller, adversary, probe,
            observers, measurements, a transform and a loss that have states, and the global random
            generators.
    """

    every_examples: int | None = None
    every_minutes: float | None = None
    keep: int = 2
    state: Mapping[str, Stateful] = field(default_factory=dict)

    def __post_init__(self) -> None:
        otherwise = "the ends of epochs alone"
        check_count("Checkpoints.every_examples", self.every_examples, none=otherwise)
        check_limit("Checkpoints.every_minutes", self.every_minutes, otherwise)
        check_count("Checkpoints.keep", self.keep)
        check_parts(state=self.state)


class Saver:
    """Decides when a checkpoint is due within an epoch, and writes it."""

    def __init__(self, when: Checkpoints) -> None:
        self._when = when
        self._time = time.monotonic()
        self._proven: set[bool] = set()

    def is_due(self, counters: Counters) -> bool:
        """Return whether a checkpoint is due by the examples since the last one."""
        every = self._when.every_examples
        return every is not None and counters.examples - counters.saved_at >= every

    @property
    def time_is_up(self) -> bool:
        """Whether a checkpoint is due by the clock of this process."""
        minutes = self._when.every_minutes
        return minutes is not None and time.monotonic() - self._time >= 60 * minutes

    def restart_clock(self) -> None:
        """Measure the minutes to the next checkpoint from now."""
        self._time = time.monotonic()

    def save(self, run_dir: Path, state: Mapping[str, Any], name: str) -> None:
        """Write `state` under `name` into the run's folder of checkpoints."""
        path = run_dir / CHECKPOINTS / name
        checkpoints.save(path, state, self._when.keep)
        # An unreadable state should fail now rather than at a resume: new, and filled by steps.
        is_filled = state["updates"] > 0
        if is_filled not in self._proven:
            self._proven.add(is_filled)
            try:
                checkpoints.load(path)
            except HessianFlowError as error:
                raise HessianFlowError(
                    "the state of this run cannot be kept: a part of it holds values other than"
                    f" tensors, numbers and strings ({error})"
                ) from None
