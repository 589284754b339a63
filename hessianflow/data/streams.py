"""The order in which examples are visited, and the place reached in it.

An epoch visits every example once, in an order drawn from (seed, epoch) alone. The place is counted
in examples, so it means the same whatever the batch size, the number of ranks or the number of
interruptions. Order, crops, flips and cutouts are drawn from separate generators: switching one on
leaves the others, and the order, as they were.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from hessianflow.interfaces import HessianFlowError

T = TypeVar("T")

Stream = Literal[
    "order", "crop", "flip", "cutout", "example", "sample", "collate", "held", "workers"
]
_STREAM_KEYS: Mapping[Stream, int] = {
    "order": 0,
    "crop": 1,
    "flip": 2,
    "cutout": 3,
    "example": 4,
    "sample": 5,
    "collate": 6,
    "held": 7,
    "workers": 8,
}
_STATE_KEYS = ("seed", "epoch", "cursor", "batch_size", "num_examples")


def stream_seed(seed: int, stream: Stream, *key: int) -> int:
    """Return a 63-bit seed for one named stream and key (an epoch, an example, ...), independent of
    all others."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAM_KEYS[stream], *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """Return a CPU generator seeded with :func:`stream_seed`: draws are the same whichever device
    they end on."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *key))


class ExampleStream:
    """Place in a shuffled, endless sequence of epochs over `num_examples` examples; the base of
    both kinds of batches.

    Iterating yields what is left of the current epoch, the last partial batch included, then enters
    the next epoch. A batch that cannot be made, for an error of the data or an interruption, is the
    next one to come. Without shuffling every iteration starts at the first example, as evaluation
    wants it, until a state is loaded or a rank set: from then on it goes on where it stood, too.

    With several ranks, a batch of n examples that starts at place p is cut into contiguous parts:
    rank r of w takes [p + n*r//w, p + n*(r+1)//w). All ranks see the same number of batches; where
    a batch has fewer examples than there are ranks, some parts are empty.

    An epoch whose examples are no multiple of the batch size ends in a smaller batch. Were that
    less than half a batch, it shares its examples evenly with the one before (of 4,000 at 398: nine
    of 398, then 209 and 209; not ten and one of 20). A few examples would take a step at the rate
    that belongs to many, with their gradient's noise; a rate that grew with the batch can turn a
    run over that way. A single example left over by batches of two joins them, as batch
    normalisation cannot train on one.

    Args:
        num_examples: size of the data set.
        batch_size: examples a batch over all ranks, at most `num_examples` when shuffling (an
            update that asks for more would silently be smaller).
        seed: of order and augmentation, non-negative.
        shuffle: False visits the examples in the order they are stored (evaluation).

    Raises:
        HessianFlowError: no examples, a batch size out of range, or a negative seed.
    """

    def __init__(self, num_examples: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        if num_examples < 1:
            raise HessianFlowError("the data set is empty: at least one example is needed")
        if seed < 0:
            raise HessianFlowError(f"seed must be at least 0, got {seed}")
        self._num_examples, self._seed, self._shuffle = num_examples, seed, shuffle
        self._epoch, self._cursor = 0, 0
        self._rank, self._world_size = 0, 1
        self._is_shared = self._has_warned = False
        self._starts_over = not shuffle
        self._batch_size = self._checked_batch_size(batch_size)

    @property
    def num_examples(self) -> int:
        """Examples an epoch, over all ranks."""
        return self._num_examples

    @property
    def batch_size(self) -> int:
        """Examples a batch, over all ranks."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    @property
    def cursor(self) -> int:
        """Examples of the current epoch handed out so far, over all ranks."""
        return self._cursor

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on."""
        self._batch_size = self._checked_batch_size(batch_size)

    def set_shard(self, rank: int, world_size: int) -> None:
        """Hand out only this rank's contiguous part of every batch, from the very next batch on.

        Raises:
            HessianFlowError: `rank` outside [0, world_size).
        """
        if not 0 <= rank < world_size:
            raise HessianFlowError(
                f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}"
            )
        self._rank, self._world_size = rank, world_size
        self._is_shared, self._starts_over = True, False

    def state_dict(self) -> dict[str, Any]:
        """Seed and place as plain ints; the same on every rank."""
        values = (self._seed, self._epoch, self._cursor, self._batch_size, self._num_examples)
        return dict(zip(_STATE_KEYS, values, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of `state`, at its batch size.

        Raises:
            HessianFlowError: a state of other data or of another seed, or one that is incomplete or
                out of range.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise HessianFlowError(
                f"this is no state of a data stream: it lacks {', '.join(missing)}"
            )
        self._check_same(state, "num_examples", "examples", self._num_examples)
        self._check_same(state, "seed", "as seed", self._seed)
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= self._num_examples:
            raise HessianFlowError(
                f"the place of a data stream must lie in an epoch of {self._num_examples} examples,"
                f" got epoch {epoch}, cursor {cursor}: the state is damaged"
            )
        self._batch_size = self._checked_batch_size(int(state["batch_size"]))
        self._epoch, self._cursor = epoch, cursor
        self._starts_over = False

    def _handed_out(self, make: Callable[[int, int], T]) -> Iterator[T]:
        """What `make` makes of this rank's [start, stop) for each batch left in the epoch.

        The cursor moves before a batch is handed out, so a state taken while it is in use lies
        behind it.
        """
        self._warn_of_equal_ranks()
        if self._starts_over:
            self.rewind()
        while self._cursor < self._num_examples:
            start = self._cursor
            size = self._next_size(start)
            self._cursor = start + size
            first, last = (size * r // self._world_size for r in (self._rank, self._rank + 1))
            try:
                batch = make(start + first, start + last)
            except BaseException:
                self._cursor = start
                raise
            yield batch
        self._epoch, self._cursor = self._epoch + 1, 0

    def rewind(self) -> None:
        """Go to the first example of the epoch under way: whoever wants all examples begins there,
        for somebody may have looked at a batch."""
        self._cursor = 0

    def _warn_of_equal_ranks(self) -> None:
        """Say once that the ranks of the process group would all go through the same examples."""
        if (
            self._is_shared
            or self._has_warned
            or not self._shuffle
            or not distributed.is_available()
        ):
            return
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            self._has_warned = True
            warnings.warn(
                f"each of the {distributed.get_world_size()} ranks of the process group goes"
                f" through all {self._num_examples} examples, in the same order: call"
                f" set_shard(rank, world_size) on this {type(self).__name__}, or set_shard(0, 1) if"
                " that is meant",
                stacklevel=3,
            )

    def _next_size(self, start: int) -> int:
        """Return the number of examples of the batch that starts at place `start`."""
        left = self._num_examples - start
        tail = left - self._batch_size
        if tail <= 0:
            return left
        # A tail of one example is short even beside a batch of two.
        if not self._shuffle or self._batch_size == 1 or 2 * tail >= max(self._batch_size, 3):
            return self._batch_size
        half = -(-left // 2)
        return half if left - half > 1 else left

    def _order(self) -> Tensor:
        """Return which example stands at each place of the current epoch, int64 [num_examples], on
        the CPU."""
        if not self._shuffle:
            return torch.arange(self._num_examples)
        return torch.randperm(
            self._num_examples, generator=generator(self._seed, "order", self._epoch)
        )

    def _sampled_indices(self, count: int, seed: int) -> Tensor:
        if not 1 <= count <= self._num_examples:
            raise HessianFlowError(
                f"count must lie between 1 and the {self._num_examples} examples, got {count}"
            )
        return torch.randperm(self._num_examples, generator=generator(seed, "sample"))[:count]

    def _checked_batch_size(self, batch_size: int) -> int:
        if batch_size < 1:
            raise HessianFlowError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size != int(batch_size):
            raise HessianFlowError(f"batch_size must be a whole number, got {batch_size!r}")
        if self._shuffle and batch_size > self._num_examples:
            raise HessianFlowError(
                f"batch_size must not exceed the {self._num_examples} examples of the data set, got"
                f" {batch_size}: choose a smaller batch, or a smaller maximum for the controller"
            )
        return int(batch_size)

    @staticmethod
    def _check_same(state: Mapping[str, Any], key: str, what: str, mine: int) -> None:
        if state[key] != mine:
            raise HessianFlowError(
                f"the saved data stream had {state[key]} {what}, this one has {mine}: cannot resume"
            )
