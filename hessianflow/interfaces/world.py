"""The ranks that train one model together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hessianflow.interfaces.errors import HessianFlowError


class Reducer(Protocol):
    """How ranks agree: sums weighted by the caller, and one rank's word for all. One process: both
    do nothing."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in place where possible."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        ...


class Hits(NamedTuple):
    """How many targets were hit.

    Attributes:
        correct: targets whose class had the largest score, an int64 scalar on the device.
        counted: targets that count; those that the loss ignores do not.
    """

    correct: Tensor
    counted: int | float | Tensor


@dataclass(frozen=True)
class StepResult:
    """What the loss gave over one optimization batch, or over any part of it.

    Results add up: those of microbatches to that of a rank's share, those of ranks to that of the
    batch, those of batches to that of an epoch. Tensors stay on the device.

    Attributes:
        total: the sum of the losses, which is the mean loss times `weight`; 0 where nothing counts.
        weight: what the mean loss divides by: the number of rows, or what the loss counts instead
            of them (:mod:`hessianflow.losses`).
        hits: of the rows; None where they are not counted, and without rows.
        rows: the number of rows trained.
        examples: the number of examples drawn from the data; a transform may have made another
            number of rows of them.
        divisor: what the mean divides by whose gradient `.grad` holds. It differs from `weight`
            where rows and twins are averaged together.
        twins: the result of the adversarial twins; None where there are none.
        failure: why the loss cannot be cut into parts, if it cannot.
    """

    total: Tensor
    weight: float | Tensor
    hits: Hits | None = None
    rows: int = 0
    examples: int = 0
    divisor: float | Tensor = 0
    twins: "StepResult | None" = None
    failure: HessianFlowError | None = None

    @property
    def loss(self) -> Tensor:
        """The mean loss, a scalar on the device; 0 where nothing counts."""
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight > 0, self.total / self.weight, 0.0)
        return self.total / (self.weight or 1)

    def __add__(self, other: "StepResult") -> "StepResult":
        """Return the result of both batches, or parts, taken together."""
        return StepResult(
            self.total + other.total,
            self.weight + other.weight,
            self._hits_with(other),
            self.rows + other.rows,
            self.examples + other.examples,
            self.divisor + other.divisor,
            self._twins_with(other),
            self.failure or other.failure,
        )

    def _hits_with(self, other: "StepResult") -> Hits | None:
        """Return the hits of both; None where those of any row are not counted."""
        if self.rows == 0 or other.rows == 0:
            return self.hits or other.hits
        if self.hits is None or other.hits is None:
            return None
        return Hits(self.hits.correct + other.hits.correct, self.hits.counted + other.hits.counted)

    def _twins_with(self, other: "StepResult") -> "StepResult | None":
        if self.twins is None or other.twins is None:
            return self.twins or other.twins
        return self.twins + other.twins


class Wishes(NamedTuple):
    """What a rank may wish for at the end of a step; each comes true if any rank wishes it.

    Attributes:
        stop: to save a checkpoint and stop.
        save: to save a checkpoint.
        show: to read the figures from the device and show them.
    """

    stop: bool = False
    save: bool = False
    show: bool = False


class World(Reducer, Protocol):
    """The ranks that train one model together, as a trainer sees them. One process: a world that
    does nothing.

    For each gradient: `begin`; backward passes that leave in `.grad` that of a mean over this
    rank's own examples, the last of them within `last_backward`; `finish`, after which `.grad` is
    that of the mean over all. Every rank takes part, also one without examples; every method but
    `attach`, `shard`, `post`, `begin` and `last_backward` must be called by all ranks together.
    Plain values are nested dicts, lists and tuples of numbers, strings and tensors.
    """

    @property
    def agreed(self) -> Wishes:
        """What any rank wished for when the ranks last met in `finish`."""
        ...

    def post(self, wishes: Callable[[], Wishes]) -> None:
        """Ask `wishes` for those of this rank whenever the ranks meet in `finish` from now on.

        They travel with the figures of the step, and cost no exchange of their own.
        """
        ...

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take over the gradients of `parameters`, those of the model and others; no rank is met
        yet."""
        ...

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Refuse ranks that differ in their settings, then give all ranks rank 0's weights."""
        ...

    def shard(self, data: Any) -> None:
        """Let a rank's training data hand out this rank's part of every batch."""
        ...

    def begin(self, examples: int) -> None:
        """Announce this rank's share of the next batch."""
        ...

    def last_backward(self, weight: float | Tensor) -> AbstractContextManager[None]:
        """Within it every gradient is final as soon as it is computed; may be entered again if the
        pass failed.

        Args:
            weight: what the mean that this rank differentiates divides by; it counts for that among
                the ranks.
        """
        ...

    def finish(self, own: StepResult) -> StepResult:
        """Wait until all gradients are those of the whole batch.

        Args:
            own: the result of this rank's share.

        Returns:
            The result of the whole batch, the same on every rank. Where a rank's loss cannot be
            cut into parts, it says so on all of them.
        """
        ...

    def average_buffers(self) -> None:
        """Give all ranks the same buffers: running statistics averaged, others as on rank 0."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        ...


@runtime_checkable
class JoinsRanks(Protocol):
    """A part that works on one rank's examples and must know which of how many ranks that is."""

    def join(self, reducer: Reducer) -> None:
        """Take this rank's place: called before training, and again where the ranks have
        changed."""
        ...


@runtime_checkable
class Shardable(Protocol):
    """Training data that can hand out one rank's part of every batch."""

    def set_shard(self, rank: int, world_size: int) -> None:
        """Hand out this rank's part from the very next batch on."""
        ...
