"""The base of all controllers: a state of plain values, and the decision read off it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from hessianflow.checks import check_count
from hessianflow.control.checks import check_cap, check_fits
from hessianflow.interfaces.control import NO_SIGNALS, CurvatureReading, Decision, Progress
from hessianflow.interfaces.errors import HessianFlowError


@dataclass
class ControllerState:
    """The setting in force and the last epoch seen.

    A controller with a memory adds plain fields of its own.

    Attributes:
        batch_size: Examples per optimizer step.
        lr_factor: Multiplier of the scheduled learning rate, relative to the start.
        attack_factor: Multiplier of the adversary's share.
        reason: Why the last update changed the setting; empty when it did not.
        epoch: Epochs completed at the last update.
    """

    batch_size: int
    lr_factor: float = 1.0
    attack_factor: float = 1.0
    reason: str = ""
    epoch: int = 0


class Measured(NamedTuple):
    """The measurements from which one update is decided."""

    progress: Progress
    reading: CurvatureReading | None
    signals: Mapping[str, float]


S = TypeVar("S", bound=ControllerState)


class Controller(ABC, Generic[S]):
    """A state machine that decides once per completed epoch.

    A subclass adds `_decide`, which changes the state and returns the reason, and `needs` if it
    asks for measurements.

    Args:
        state: Setting to start with.
        max_batch_size: Largest examples per step.

    Raises:
        HessianFlowError: A size is not a whole number >= 1, or the cap lies below the first size.
    """

    prefers: ClassVar[Mapping[str, str]] = {}
    """Settings of a run with this controller, unless the user gives others."""
    follows_rule: bool = False
    """Whether the learning rate follows the batch by a rule that another rule may replace."""
    reads_hessian: ClassVar[bool] = False
    """Whether it decides by the Hessian's eigenvalue of the largest magnitude, whatever the
    optimizer. Other controllers get that which decides where the optimizer's steps are stable."""

    def __init__(self, state: S, max_batch_size: int) -> None:
        check_count("batch_size", state.batch_size)
        self._state = state
        self.max_batch_size = check_cap(state.batch_size, max_batch_size)

    @property
    def needs(self) -> frozenset[str]:
        """Name the signals wanted at the next update: none, unless a subclass says so."""
        return frozenset()

    @property
    def decision(self) -> Decision:
        """Return the setting in force."""
        state = self._state
        return Decision(state.batch_size, state.lr_factor, state.attack_factor, state.reason)

    def is_due(self, progress: Progress) -> bool:
        """Return whether an epoch was completed since the last update."""
        return progress.epoch > self._state.epoch

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision:
        """Return the setting from now on, decided from the signals that `needs` named.

        Raises:
            HessianFlowError: The largest batch exceeds the training set, or a signal is missing.
        """
        check_fits(self.max_batch_size, progress.examples_per_epoch)
        self._state.epoch = progress.epoch
        self._state.reason = self._decide(Measured(progress, reading, signals))
        return self.decision

    @abstractmethod
    def _decide(self, measured: Measured, /) -> str:
        """Change the state and return why, or an empty string when nothing changed."""

    def state_dict(self) -> dict[str, Any]:
        """Return every value needed to continue, as numbers, strings and None."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            HessianFlowError: The names do not match, as in the state of another controller.
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
    """Return floor(batch_size * factor), but at least one more than before and at most `cap`."""
    # The small constant keeps a product that is whole in exact arithmetic, such as 100 * 1.15, from
    # being rounded down.
    return min(cap, max(batch_size + 1, int(batch_size * factor + 1e-9)))
