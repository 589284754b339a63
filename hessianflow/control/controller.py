"""What all controllers share: a state of plain values, and the decision read off it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from hessianflow.control.checks import check_cap, check_count, check_fits
from hessianflow.interfaces.control import NO_SIGNALS, CurvatureReading, Decision, Progress
from hessianflow.interfaces.errors import HessianFlowError


@dataclass
class ControllerState:
    """The setting in force and the last epoch seen; controllers with a memory add their own plain
    fields.

    Attributes:
        batch_size: examples per optimizer step.
        lr_factor: multiplier of the scheduled learning rate, relative to the start.
        attack_factor: multiplier of the adversary's share.
        reason: why the last update changed the setting; empty when it did not.
        epoch: epochs completed at the last update.
    """

    batch_size: int
    lr_factor: float = 1.0
    attack_factor: float = 1.0
    reason: str = ""
    epoch: int = 0


class Measured(NamedTuple):
    """What one update is decided from."""

    progress: Progress
    reading: CurvatureReading | None
    signals: Mapping[str, float]


S = TypeVar("S", bound=ControllerState)


class Controller(ABC, Generic[S]):
    """A state machine that decides once per completed epoch.

    A subclass adds `_decide`, which changes the state and returns the reason, and `needs` if it
    measures something.

    Args:
        state: the setting to start with.
        max_batch_size: the cap.

    Raises:
        HessianFlowError: a size is not a whole number >= 1, or the cap lies below the first size.
    """

    prefers: ClassVar[Mapping[str, str]] = {}
    """Settings that a run with this controller has unless others are given."""
    follows_rule: ClassVar[bool] = False
    """Whether the learning rate follows the batch by a rule, which another may replace."""

    def __init__(self, state: S, max_batch_size: int) -> None:
        check_count("batch_size", state.batch_size)
        self._state = state
        self.max_batch_size = check_cap(state.batch_size, max_batch_size)

    @property
    def needs(self) -> frozenset[str]:
        """Signals wanted at the next update: none."""
        return frozenset()

    @property
    def decision(self) -> Decision:
        """The setting in force."""
        state = self._state
        return Decision(state.batch_size, state.lr_factor, state.attack_factor, state.reason)

    def is_due(self, progress: Progress) -> bool:
        """Whether an epoch was completed since the last update."""
        return progress.epoch > self._state.epoch

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision:
        """The setting from now on, decided from what `needs` named.

        Raises:
            HessianFlowError: the largest batch would exceed the training set, or a signal asked for
                is missing.
        """
        check_fits(self.max_batch_size, progress.examples_per_epoch)
        self._state.epoch = progress.epoch
        self._state.reason = self._decide(Measured(progress, reading, signals))
        return self.decision

    @abstractmethod
    def _decide(self, measured: Measured, /) -> str:
        """Change the state; return why, or an empty string when nothing changed."""

    def state_dict(self) -> dict[str, Any]:
        """Every value needed to continue, as numbers, strings and None."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            HessianFlowError: the names do not match, as in the state of another controller.
        """
        expected = {field.name for field in fields(self._state)}
        if state.keys() != expected:
            different = sorted(expected.symmetric_difference(state.keys()))
            raise HessianFlowError(
                f"state must come from {type(self).__name__}, but the names {different} are missing"
                " or unknown"
            )
        self._state = type(self._state)(**state)


def grown(batch_size: int, factor: float, cap: int) -> int:
    """floor(batch_size * factor), at least one more than before, at most `cap`.

    The small constant keeps a product that is whole in exact arithmetic from being rounded down
    (100 * 1.15 = 115).
    """
    return min(cap, max(batch_size + 1, int(batch_size * factor + 1e-9)))
