"""Protocols and records of the ranks that train one model together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hessianflow.interfaces.errors import HessianFlowError


class Reducer(Protocol):
    """The means by which ranks agree: sums, and values from rank 0.

    In a single process both return their argument.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in place where possible."""

    def broadcast(self, value: Any) -> Any:
        """Return the plain value of rank 0 on every rank."""


class GroupReducer(Reducer, Protocol):
    """A reducer that can also overlap a sum with other work, and gather a value from every rank."""

    def start_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a contiguous `tensor` over ranks in place, and return a function.

        Call the function before you read the tensor.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        ...

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by rank 0's, in place."""
        ...


class LocalReducer:
    """The reducer of a single process, which returns every value as it is."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], object]:  # noqa: ARG002
        """Return a function that does nothing, since there is nothing to wait for."""
        return lambda: None

    def broadcast(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def gather(self, value: Any) -> list[Any]:
        """Return a list of this one value."""
        return [value]


class Hits(NamedTuple):
    """The number of targets that were predicted correctly.

    Attributes:
        correct: Targets whose class had the largest score, an int64 scalar on the device.
        counted: Targets that count, without those that the loss ignores.
    """

    correct: Tensor
    counted: int | float | Tensor


@dataclass(frozen=True)
class StepResult:
    """The losses of one optimization batch, or of any part of it.

    Results add up: those of microbatches to that of a rank, those of ranks to that of the batch,
    those of batches to that of an epoch. Tensors stay on the device.

    Attributes:
        total: Sum of the losses, which is the mean loss times `weight`; 0 if nothing counts.
        weight: Divisor of the mean loss, which is the number of rows, or what the loss counts
            instead of them (:mod:`hessianflow.losses`).
        hits: Correct predictions of the rows; None if they are not counted or there are no rows.
        rows: Number of rows trained on.
        examples: Number of examples drawn from the data, from which a transform may make more or
            fewer rows.
        divisor: Divisor of the mean whose gradient `.grad` holds. It differs from `weight` if rows
            and twins are averaged together.
        twins: Result of the adversarial twins; None if there are none.
        failure: Reason why the loss cannot be split into parts; None if it can.
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
        """Return the mean loss, a scalar on the device; 0 if nothing counts."""
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight > 0, self.total / self.weight, 0.0)
        return self.total / (self.weight or 1)

    def __add__(self, other: "StepResult") -> "StepResult":
        """Return the result of both batches, or parts, together."""
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
        """Return the hits of both, or None if those of any row are not counted."""
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
    """The wishes of a rank at the end of a step, each of which one rank is enough to fulfil.

    Attributes:
        stop: Save a checkpoint and stop.
        save: Save a checkpoint.
        show: Read the figures from the device and show them.
    """

    stop: bool = False
    save: bool = False
    show: bool = False


class World(Reducer, Protocol):
    """The ranks that train one model together, as a trainer sees them.

    Each gradient takes three steps. `begin` comes first. Backward passes then leave in `.grad` the
    gradient of a mean over the rank's own examples, the last of them within `last_backward`. After
    `finish`, `.grad` is that of the mean over all ranks. Every rank takes part, even one without
    examples. All ranks must call every method together, except `attach`, `shard`, `post`, `begin`
    and `last_backward`. Plain values are nested dicts, lists and tuples of numbers, strings and
    tensors.
    """

    @property
    def agreed(self) -> Wishes:
        """Return the wishes of all ranks when they last met in `finish`."""

    def post(self, wishes: Callable[[], Wishes]) -> None:
        """Call `wishes` for those of this rank at every `finish` from now on.

        They travel with the figures of the step, without an extra exchange.
        """

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take over the gradients of `parameters` of the model and others, without an exchange."""

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Refuse ranks with different settings, then give all ranks the weights of rank 0."""

    def shard(self, data: Any) -> None:
        """Let the training data yield this rank's part of every batch."""

    def begin(self, examples: int) -> None:
        """Announce the number of this rank's examples in the next batch."""

    def last_backward(self, weight: float | Tensor) -> AbstractContextManager[None]:
        """Enter the last backward pass, in which every computed gradient is final.

        It may be entered again if the pass failed.

        Args:
            weight: Divisor of the mean that this rank differentiates, its weight among the ranks.
        """

    def finish(self, own: StepResult) -> StepResult:
        """Wait until all gradients are those of the whole batch.

        Args:
            own: Result of this rank's part.

        Returns:
            The result of the whole batch, the same on every rank. If the loss of a rank cannot be
            split into parts, it has the failure on all of them.
        """

    def average_buffers(self) -> None:
        """Give all ranks averaged running statistics, and the other buffers of rank 0."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""


@runtime_checkable
class JoinsRanks(Protocol):
    """A part that works on one rank's examples and must know the rank and their number."""

    def join(self, reducer: Reducer) -> None:
        """Become part of a rank, before training and again after the ranks have changed."""


@runtime_checkable
class Shardable(Protocol):
    """Training data that can yield one rank's part of every batch."""

    def set_shard(self, rank: int, world_size: int) -> None:
        """Yield this rank's part from the very next batch on."""
