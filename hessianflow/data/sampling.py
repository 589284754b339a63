"""Batches of changing size from any map-style data set, loaded ahead by worker processes.

A `DataLoader` with persistent workers loads small chunks of fixed size in the order of the epoch; the consumer cuts the
stream of chunks into batches of the size wanted at that moment. A change of size therefore takes effect on the very
next batch, and the workers never notice it. (With several ranks the parts of future batches do depend on their size:
there, what was loaded ahead is dropped once.)

The random numbers of an example's own transforms (Python, NumPy and torch, in worker or main process) are seeded from
(seed, epoch, index), so that they too are the same whatever the batch size, the workers or the interruptions.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from hessianflow.batches import map_tensors, move, num_examples
from hessianflow.data.streams import ExampleStream, stream_seed
from hessianflow.interfaces import Batch, HessianFlowError

Key = tuple[int, int]
"""(epoch, index): which example, and which of its random variations."""


class AdaptiveBatches(ExampleStream):
    """Resumable batches of a map-style data set, whose size may change at any time.

    Iterating yields what is left of the current epoch, the last partial batch included, then enters the next epoch
    (see `hessianflow.interfaces.ResizableBatches`). All iterators share one place: use one at a time.

    Args:
        dataset: any map-style `torch.utils.data.Dataset` with a length; its items are collated by `collate_fn`.
        batch_size: examples a batch, over all ranks.
        seed: of order and of the examples' own random transforms.
        num_workers: processes that load; 0: load in this one.
        pin_memory: page-locked chunks, for an overlapping copy to a GPU.
        device: where the batches are put.
        transform: applied to every batch once it is on the device, e.g. :class:`hessianflow.data.Normalise`.
        collate_fn: makes a batch of a list of items; None: torch's default.
        shuffle: False for evaluation: the order is the stored one, and a batch may be larger than the set.
        chunk_size: examples a worker loads at a time.
        prefetch_examples: how far to load ahead, over all workers.
        value_range: lowest and highest valid input (after `transform`), to clamp attacks; handed through.

    Raises:
        HessianFlowError: a data set without a length, or a number out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
        transform: Callable[[Batch], Batch] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        chunk_size: int = 32,
        prefetch_examples: int = 1024,
        value_range: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        _check_options(dataset, num_workers, chunk_size, prefetch_examples)
        super().__init__(len(dataset), batch_size, seed=seed, shuffle=shuffle)  # type: ignore[arg-type]
        self._examples = _SeededExamples(dataset, seed)
        self._collate = collate_fn or default_collate
        self._transform, self._device, self._pin_memory = transform, torch.device(device), pin_memory
        self._value_range = value_range
        self._plan = _ChunkPlan(chunk_size)
        self._loader: DataLoader[Any] = DataLoader(
            self._examples,
            batch_sampler=self._plan,
            num_workers=num_workers,
            collate_fn=self._collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader draws from the global one
            persistent_workers=num_workers > 0,
            prefetch_factor=max(2, -(-prefetch_examples // (chunk_size * num_workers))) if num_workers else None,
        )
        self._chunks: Iterator[Any] | None = None
        self._loaded: deque[Any] = deque()

    @property
    def device(self) -> torch.device:
        """Where the batches are put."""
        return self._device

    @property
    def value_range(self) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest valid input, as given."""
        return self._value_range

    def set_batch_size(self, batch_size: int) -> None:
        """Takes effect on the very next batch; workers go on."""
        super().set_batch_size(batch_size)
        if self._world_size > 1:
            self._forget_chunks()

    def set_shard(self, rank: int, world_size: int) -> None:
        """Hand out only this rank's contiguous part of every batch, from the very next batch on."""
        super().set_shard(rank, world_size)
        self._forget_chunks()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of `state`, at its batch size; see :meth:`ExampleStream.load_state_dict`."""
        super().load_state_dict(state)
        self._forget_chunks()

    def __iter__(self) -> Iterator[Batch]:
        for start, stop in self._next_places():
            if self._chunks is None:
                self._plan.keys = [(self._epoch, int(i)) for i in self._order()[self._places_from(start, stop)]]
                self._chunks = iter(self._loader)
            yield self._finished(self._take(stop - start))
        self._forget_chunks()

    def examples(self, indices: Tensor) -> Batch:
        """The examples at `indices` (int64 [n]), loaded here and now; the stream does not move.

        Transforms of the data set apply as in epoch 0: give a set without random ones to measure on.
        """
        items = self._examples.__getitems__([(0, int(index)) for index in indices])
        return self._finished(move(self._collate(items), self._device))

    def sample(self, count: int, seed: int = 0) -> Batch:
        """`count` different examples chosen by `seed` alone: the fixed batch of a curvature probe.

        Raises:
            HessianFlowError: `count` below 1 or above the number of examples.
        """
        return self.examples(self._sampled_indices(count, seed))

    def _places_from(self, start: int, stop: int) -> Tensor:
        """Places this rank will need: those of the batch at hand, then of all later ones at the current size."""
        if self._world_size == 1:
            return torch.arange(start, self._num_examples)
        parts = [torch.arange(start, stop)]
        first = self._cursor
        while first < self._num_examples:
            size = self._next_size(first)
            parts.append(torch.arange(*(first + size * r // self._world_size for r in (self._rank, self._rank + 1))))
            first += size
        return torch.cat(parts)

    def _take(self, count: int) -> Any:
        """The next `count` loaded examples, joined from chunks; what is left of the last chunk stays for later."""
        if count == 0:
            return map_tensors(
                lambda t: t[:0], move(self._collate(self._examples.__getitems__([(0, 0)])), self._device)
            )
        assert self._chunks is not None
        parts = []
        while count > 0:
            if not self._loaded:
                self._loaded.append(move(next(self._chunks), self._device, non_blocking=self._pin_memory))
            chunk = self._loaded.popleft()
            size = num_examples(chunk)
            if size > count:
                self._loaded.appendleft(map_tensors(lambda t, n=count: t[n:], chunk))  # type: ignore[misc]
                chunk = map_tensors(lambda t, n=count: t[:n], chunk)  # type: ignore[misc]
            parts.append(chunk)
            count -= size
        return _joined(parts)

    def _finished(self, batch: Any) -> Batch:
        pair: Batch = tuple(batch)
        return pair if self._transform is None else self._transform(pair)

    def _start_over(self) -> None:
        super()._start_over()
        self._forget_chunks()  # they are of the place that an iteration before had reached

    def _forget_chunks(self) -> None:
        self._chunks = None
        self._loaded.clear()


class _ChunkPlan:
    """The batch sampler of the loader: the keys still to load, a chunk at a time."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.keys), self.chunk_size):
            yield self.keys[start : start + self.chunk_size]


class _SeededExamples(Dataset[Any]):
    """Items by (epoch, index), each loaded with random numbers of its own."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """The items, in order; the global generators are left as found."""
        items = []
        with _random_states_kept():
            for epoch, index in keys:
                _seed_everything(stream_seed(self.seed, "example", epoch, index))
                items.append(self.dataset[index])
        return items


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a call for every GPU, in each worker and for each example.
    torch.default_generator.manual_seed(seed)


def _joined(parts: list[Any]) -> Any:
    """One batch from several of the same structure."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined(list(column)) for column in zip(*parts, strict=True)))
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(list(column)) for column in zip(*parts, strict=True))
    raise HessianFlowError(
        f"batches must be tensors in dicts, lists or tuples, found a {type(first).__name__}: "
        "leave it out in the data set or in collate_fn"
    )


def _check_options(dataset: Dataset[Any], num_workers: int, chunk_size: int, prefetch_examples: int) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise HessianFlowError(
            f"dataset must be map-style, with a length and items by index, got {type(dataset).__name__}: "
            "an iterable data set has no order to resume in"
        )
    for name, value, least in (
        ("num_workers", num_workers, 0),
        ("chunk_size", chunk_size, 1),
        ("prefetch_examples", prefetch_examples, 1),
    ):
        if value < least:
            raise HessianFlowError(f"{name} must be at least {least}, got {value}")
