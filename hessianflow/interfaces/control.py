"""Input and output of a controller: progress, a reading, a decision. This module needs no torch."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

NormMode = Literal["eval", "batch"]
"""Statistics of batch normalisation in a measurement: "eval" uses the running ones, "batch" those
of the measured batch, which leaves the running ones untouched."""

HESSIAN = "Hessian"
"""Name of the matrix of second derivatives of the loss, of which most readings are."""

UNKNOWN = sys.maxsize
"""An unknown number of examples: that of a stream, or of an epoch that is counted in updates."""

NO_SIGNALS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    An epoch is one pass over the training data, unless the run says otherwise
    (:class:`hessianflow.training.Every`).

    Attributes:
        epoch: Epochs completed.
        examples: Training examples used so far, over all ranks.
        updates: Optimizer steps taken so far.
        examples_per_epoch: Examples of an epoch; `UNKNOWN` if updates or the end of the data decide
            when it ends.
        total_epochs: Planned epochs of the run; None if their number depends on later batch sizes.
        passed: Epochs passed, with a fraction; None if `examples` determines them.
        done: Share of the run that is over; None if the epochs determine it.
    """

    epoch: int
    examples: int
    updates: int
    examples_per_epoch: int
    total_epochs: int | None
    passed: float | None = None
    done: float | None = None

    @property
    def epochs_passed(self) -> float:
        """Return how many epochs have passed, including a fraction of the current one."""
        if self.passed is not None:
            return self.passed
        return self.examples / self.examples_per_epoch

    @property
    def is_over(self) -> bool:
        """Return whether the run has reached its end."""
        if self.done is not None:
            return self.done >= 1
        return self.total_epochs is not None and self.epoch >= self.total_epochs

    @property
    def fraction(self) -> float:
        """Return the share of the run that is over, from 0 to 1."""
        if self.done is not None:
            return self.done
        assert self.total_epochs is not None
        return min(1.0, self.epochs_passed / self.total_epochs)


@dataclass(frozen=True)
class CurvatureReading:
    """One measurement of the loss curvature, with `float("nan")` for figures that are not finite.

    Attributes:
        eigenvalue: Leading eigenvalue of `matrix` with its sign: the largest in magnitude or, if
            the probe knows the optimizer, the largest, unless the probe was told otherwise.
        residual: ||H v - eigenvalue v|| for the unit vector v found. A true eigenvalue is within
            this distance.
        matvecs: Matrix-vector products spent.
        converged: Whether the residual met the probe's tolerance.
        reliable: Whether the loss under running statistics of batch normalisation is near that
            under the batch's own. If not, the running ones have not settled, and the eigenvalues
            say nothing about the training loss; `details` then holds both losses, of up to 32
            examples ("running_loss", "own_loss"). Only the losses are compared, so True does not
            prove that the curvature is the same.
        eigenvalues: All tracked eigenvalues, leading first, if there are several.
        norm_mode: Statistics of batch normalisation during the measurement.
        num_examples: Examples over which the loss was averaged.
        seconds: Wall time of the measurement.
        details: Further named figures: "smoothed"; of a probe that knows the optimizer,
            "sharpness", "threshold" (steps are stable while rate times sharpness is below it) and
            "edge_share", the share of the threshold in use. They are those of the function that is
            measured: with batch normalisation only norm_mode "batch" measures the one trained.
        matrix: Name of the matrix whose eigenvalues these are. It is not the Hessian of the loss
            if the probe knows the optimizer, and that preconditions its steps (Adam).
    """

    eigenvalue: float
    residual: float
    matvecs: int
    converged: bool
    eigenvalues: tuple[float, ...] = ()
    norm_mode: NormMode = "eval"
    num_examples: int = 0
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    reliable: bool = True
    matrix: str = HESSIAN


@dataclass(frozen=True)
class Decision:
    """The setting that a controller wants from now on.

    Every field is absolute, so applying a decision twice changes nothing.

    Attributes:
        batch_size: Examples per optimizer step, from the very next batch on.
        lr_factor: Multiplier of the scheduled learning rate, 1 at the reference batch size.
        attack_factor: Multiplier of the adversary's share of each batch. With 0 nothing is
            attacked.
        reason: Reason of the change in words; empty when nothing changed.
    """

    batch_size: int
    lr_factor: float = 1.0
    attack_factor: float = 1.0
    reason: str = ""

    @property
    def setting(self) -> tuple[int, float, float]:
        """Return the decision without its reason, to compare it with others."""
        return self.batch_size, self.lr_factor, self.attack_factor


@runtime_checkable
class Stateful(Protocol):
    """A part of a checkpoint, of plain numbers, strings, lists, dicts and tensors only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class BatchController(Stateful, Protocol):
    """A deterministic state machine that turns measurements into a :class:`Decision`.

    It holds no model, optimizer or clock. `needs` names the signals that it wants at the next
    update, so that nothing else is measured: "eigenvalue" is a curvature reading, and other names
    are keys of `signals`. It may change with the state.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def decision(self) -> Decision:
        """Return the setting in force, which before any update is the first one."""

    def is_due(self, progress: Progress) -> bool: ...

    def update(
        self,
        progress: Progress,
        reading: CurvatureReading | None = None,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> Decision: ...


@runtime_checkable
class Capped(Protocol):
    """A controller that never asks for more than `max_batch_size` examples a step."""

    @property
    def max_batch_size(self) -> int: ...


@runtime_checkable
class ForgetsReference(Protocol):
    """A controller that compares measurements, and can start again when the loss changes."""

    def forget_reference(self) -> None:
        """Forget past measurements, as at a change of resolution."""
