"""What a controller sees and says: progress, a reading, a decision. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

NormMode = Literal["eval", "batch"]
"""Statistics that batch normalisation uses in a measurement: "eval" the running ones, "batch" those
of the batch measured (the running ones stay untouched)."""

NO_SIGNALS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        examples: training examples used so far, over all ranks.
        updates: optimizer steps taken so far.
        examples_per_epoch: size of the training set.
        total_epochs: epochs the run is planned for.
    """

    epoch: int
    examples: int
    updates: int
    examples_per_epoch: int
    total_epochs: int


@dataclass(frozen=True)
class CurvatureReading:
    """One measurement of the loss curvature; `float("nan")` where nothing finite was found.

    Attributes:
        eigenvalue: the leading eigenvalue (largest in magnitude unless the probe was told
            otherwise), with its sign.
        residual: ||H v - eigenvalue v|| for the unit vector v found; a true eigenvalue lies no
            farther away.
        matvecs: products spent.
        converged: whether the residual met the probe's tolerance.
        reliable: whether the loss under running statistics of batch normalisation is near that
            under the batch's own. Where it is not, they have not settled, and the eigenvalues say
            nothing of the loss that is trained; `details` then hold both losses, of up to 32
            examples ("running_loss", "own_loss"). It is judged by the loss alone: True does not
            prove that the curvature is the same.
        eigenvalues: all pairs tracked, leading first, when more than one is.
        norm_mode: the batch-normalisation statistics the value belongs to.
        num_examples: examples the loss was averaged over.
        seconds: wall time of the measurement.
        details: further named figures (trace, smoothed value, ...).
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


@dataclass(frozen=True)
class Decision:
    """What a controller wants from now on. Every field is an absolute setting, so applying it twice
    changes nothing.

    Attributes:
        batch_size: examples per optimizer step, from the very next batch on.
        lr_factor: multiplier of the scheduled learning rate (1: the rate as stated at the reference
            batch size).
        attack_factor: multiplier of the share of each batch that the adversary attacks (1: the
            adversary's own share; 0: nothing is attacked).
        reason: why, in words; empty when nothing changed.
    """

    batch_size: int
    lr_factor: float = 1.0
    attack_factor: float = 1.0
    reason: str = ""

    @property
    def setting(self) -> tuple[int, float, float]:
        """What is set, without the reason: two decisions with equal settings ask for the same."""
        return self.batch_size, self.lr_factor, self.attack_factor


@runtime_checkable
class Stateful(Protocol):
    """Whatever a checkpoint must carry: plain numbers, strings, lists, dicts and tensors only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class BatchController(Stateful, Protocol):
    """A deterministic state machine: measurements in, a :class:`Decision` out; no model, optimizer
    or clock inside.

    `needs` names the signals it wants at the next update ("eigenvalue" for a curvature reading;
    other names are keys of `signals`), so that nothing unneeded is measured. It may change with the
    state.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def decision(self) -> Decision:
        """The setting in force (before any update: the one to start with)."""
        ...

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
    """A controller that compares measurements, and can begin anew where the loss is another one."""

    def forget_reference(self) -> None:
        """Forget what was measured, as at a change of resolution."""
        ...
