"""The ranks that train one model together."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


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
class BatchTotals:
    """One optimization batch over all ranks.

    Attributes:
        loss: mean over all its examples, a scalar on the device; 0 where nothing counts.
        hits: over all its examples; None where no rank counts them.
        examples: its size.
        counts: sums over ranks of what each was asked to count.
        means: further means over ranks, each with its whole weight.
        weight: what the mean that `.grad` belongs to divides by.
    """

    loss: Tensor
    hits: Hits | None
    examples: int
    counts: tuple[int, ...] = ()
    means: tuple[tuple[Tensor, float | Tensor], ...] = ()
    weight: float | Tensor = 1.0


class World(Reducer, Protocol):
    """The ranks that train one model together, as a trainer sees them. One process: a world that
    does nothing.

    For each gradient: `begin`; backward passes that leave in `.grad` that of a mean over this
    rank's own examples, the last of them within `last_backward`; `finish`, after which `.grad` is
    that of the mean over all. Every rank takes part, also one without examples; every method but
    `attach`, `shard`, `begin` and `last_backward` must be called by all ranks together. Plain
    values are nested dicts, lists and tuples of numbers, strings and tensors.
    """

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

    def finish(
        self,
        loss: Tensor,
        hits: Hits | None,
        counts: Sequence[int] = (),
        means: Sequence[tuple[Tensor, float | Tensor]] = (),
    ) -> BatchTotals:
        """Wait until all gradients are those of the whole batch.

        Args:
            loss: the mean that was differentiated.
            hits: None without examples, or where they are not counted.
            counts: what else to sum over ranks, as many on every rank.
            means: (mean, weight) of what else to average over ranks, as many on every rank.
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
