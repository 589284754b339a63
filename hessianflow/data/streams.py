"""The order in which examples are visited, and the position reached in it.

An epoch visits every example once, in an order drawn from (seed, epoch) alone. The position is
counted in examples, so it does not depend on the batch size, the number of ranks or interruptions.
Order, crops, flips and cutouts are drawn from separate generators: switching one of them on does
not change the others.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, distributed

from hessianflow.interfaces import Batch, HessianFlowError

T = TypeVar("T")

Stream = Literal[
    "order", "crop", "flip", "cutout", "example", "sample", "collate", "held", "workers"
]
"""Random streams, in an order that seeds depend on: new ones go to the end."""
_STREAMS = get_args(Stream)
_STATE_KEYS = ("seed", "epoch", "cursor", "batch_size", "num_examples")


def stream_seed(seed: int, stream: Stream, *key: int) -> int:
    """Return a 63-bit seed, independent for each stream and key (such as an epoch)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """Return a generator seeded with :func:`stream_seed`, on the CPU so that all devices agree."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *key))


def next_size(left: int, batch_size: int) -> int:
    """Return the size of the next batch when `left` examples of the epoch are left.

    :class:`ExampleStream` describes how the last batches of an epoch share the rest.
    """
    tail = left - batch_size
    if tail <= 0:
        return left
    # A tail of one example is too short even if a batch has only two.
    if batch_size == 1 or 2 * tail >= max(batch_size, 3):
        return batch_size
    half = -(-left // 2)
    return half if left - half > 1 else left


def examples_to_judge(batch_size: int) -> int:
    """Return how many examples must be left so that the next batch is full, whatever follows."""
    if batch_size == 1:
        return 1
    return batch_size + -(-max(batch_size, 3) // 2)


class ExampleStream:
    """Position in an endless sequence of epochs over the examples; base of both kinds of batches.

    Iterating yields the rest of the current epoch, the last partial batch included, then enters
    the next epoch (see :class:`hessianflow.interfaces.ResizableBatches`). All iterators share one
    position: use one at a time. A batch that could not be made, because of an error of the data or
    an interruption, is the next one. Without shuffling every iteration starts at the first example,
    as evaluation needs it, until a state is loaded or a rank set: then it continues as well.

    With several ranks, a batch of n examples that starts at position p is cut into contiguous
    shards: rank r of w takes [p + n*r//w, p + n*(r+1)//w). All ranks see the same number of
    batches; if a batch has fewer examples than there are ranks, some shards are empty.

    If the batch size does not divide the examples, an epoch ends in a smaller batch. Where that
    would be less than half a batch, it shares its examples evenly with the batch before (4,000
    examples at 398: nine batches of 398, then 209 and 209; not ten and one of 20). A few examples
    would otherwise take a step at a rate meant for many, with the noise of their gradient, which
    can make a run diverge. A single example left over by batches of two joins the last of them,
    since batch normalisation cannot train on one.

    Args:
        num_examples: Size of the data set.
        batch_size: Examples per batch over all ranks, at most `num_examples` when shuffling (an
            update that asks for more would silently be smaller).
        seed: Seed of order and augmentation, non-negative.
        shuffle: False visits the examples in the order they are stored (evaluation), in batches
            that may be larger than the set.

    Raises:
        HessianFlowError: There are no examples, the batch size is out of range, or the seed is
            negative.
    """

    def __init__(self, num_examples: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        if num_examples < 1:
            raise HessianFlowError("the data set is empty: at least one example is needed")
        if seed < 0:
            raise HessianFlowError(f"seed must be at least 0, got {seed}")
        self._num_examples = num_examples
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = self._cursor = 0
        self._rank = 0
        self._world_size = 1
        self._is_shared = self._has_warned = False
        self._starts_over = not shuffle
        self._batch_size = self._checked_batch_size(batch_size)

    @property
    def num_examples(self) -> int:
        """Return the number of examples per epoch, over all ranks."""
        return self._num_examples

    @property
    def batch_size(self) -> int:
        """Return the number of examples per batch, over all ranks."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """Return the number of completed epochs."""
        return self._epoch

    @property
    def cursor(self) -> int:
        """Return how many examples of the current epoch all ranks have handed out so far."""
        return self._cursor

    def batches_from(self, position: int) -> int:
        """Return the number of batches from a position to the end, at the present size."""
        left = self._num_examples - position
        # In batches of two, a last single example joins the batch before; see the class.
        joins = self._shuffle and self._batch_size == 2 and left % 2 == 1 and left > 1
        return -(-left // self._batch_size) - joins

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on."""
        self._batch_size = self._checked_batch_size(batch_size)

    def set_shard(self, rank: int, world_size: int) -> None:
        """Yield only this rank's contiguous shard of every batch, from the very next batch on.

        Raises:
            HessianFlowError: `rank` lies outside [0, world_size).
        """
        if not 0 <= rank < world_size:
            raise HessianFlowError(
                f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}"
            )
        self._rank = rank
        self._world_size = world_size
        self._is_shared = True
        self._starts_over = False

    def state_dict(self) -> dict[str, Any]:
        """Return seed and position as plain ints, which are the same on every rank."""
        values = (self._seed, self._epoch, self._cursor, self._batch_size, self._num_examples)
        return dict(zip(_STATE_KEYS, values, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of `state`, at its batch size.

        Raises:
            HessianFlowError: The state is of other data or seed, incomplete or out of range.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise HessianFlowError(
                f"this is no state of a data stream: it lacks {', '.join(missing)}"
            )
        for key, what in (("num_examples", "examples"), ("seed", "as seed")):
            mine = self.state_dict()[key]
            if state[key] != mine:
                raise HessianFlowError(
                    f"the saved data stream had {state[key]} {what}, this one has {mine}: cannot"
                    " resume"
                )
        epoch = int(state["epoch"])
        cursor = int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= self._num_examples:
            raise HessianFlowError(
                f"the position of a data stream must lie within {self._num_examples} examples,"
                f" got epoch {epoch}, cursor {cursor}: the state is damaged"
            )
        self._batch_size = self._checked_batch_size(int(state["batch_size"]))
        self._epoch = epoch
        self._cursor = cursor
        self._starts_over = False

    def _handed_out(self, make: Callable[[int, int], T]) -> Iterator[T]:
        """Yield make(start, stop) of this rank's shard of each batch left in the epoch.

        The cursor moves before a batch is yielded: a state taken while it is in use lies after it.
        """
        self._warn_of_equal_ranks()
        if self._starts_over:
            self.rewind()
        while self._cursor < self._num_examples:
            start = self._cursor
            size = self._next_size(start)
            self._cursor = start + size
            try:
                batch = make(*self._shard_of(start, size))
            except BaseException:
                self._cursor = start
                raise
            yield batch
        self._epoch += 1
        self._cursor = 0

    def _shard_of(self, start: int, size: int) -> tuple[int, int]:
        """Return this rank's positions [first, last) of the batch of `size` examples at `start`."""
        first = start + size * self._rank // self._world_size
        last = start + size * (self._rank + 1) // self._world_size
        return first, last

    def rewind(self) -> None:
        """Return to the first example of the current epoch, of which some may have been taken."""
        self._cursor = 0

    def _warn_of_equal_ranks(self) -> None:
        """Warn once if the ranks of the process group would all visit the same examples."""
        if self._is_shared or self._has_warned or not self._shuffle:
            return
        ranks = 1
        if distributed.is_available() and distributed.is_initialized():
            ranks = distributed.get_world_size()
        if ranks > 1:
            self._has_warned = True
            warnings.warn(
                f"each of the {ranks} ranks of the process group goes"
                f" through all {self._num_examples} examples, in the same order: call"
                f" set_shard(rank, world_size) on this {type(self).__name__}, or set_shard(0, 1) if"
                " that is meant",
                stacklevel=3,
            )

    def _next_size(self, start: int) -> int:
        """Return the number of examples of the batch that starts at position `start`."""
        left = self._num_examples - start
        if not self._shuffle:
            return min(left, self._batch_size)
        return next_size(left, self._batch_size)

    def _order(self) -> Tensor:
        """Return the example at each position of the epoch, int64 [num_examples] on the CPU."""
        if not self._shuffle:
            return torch.arange(self._num_examples)
        source = generator(self._seed, "order", self._epoch)
        return torch.randperm(self._num_examples, generator=source)

    def sample(self, count: int, seed: int = 0) -> Batch:
        """Return `count` different examples chosen by `seed` alone, for a curvature probe.

        Raises:
            HessianFlowError: `count` is below 1 or above the number of examples.
        """
        if not 1 <= count <= self._num_examples:
            raise HessianFlowError(
                f"count must lie between 1 and the {self._num_examples} examples, got {count}"
            )
        order = torch.randperm(self._num_examples, generator=generator(seed, "sample"))
        return self.examples(order[:count])

    def examples(self, indices: Tensor) -> Batch:
        """Return the examples at `indices` (int64 [n]); the stream does not move."""
        raise NotImplementedError

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
