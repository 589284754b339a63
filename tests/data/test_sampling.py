"""Batches from a map-style data set: the same promises as on the device, with workers and random
transforms."""

import gc
import itertools
import multiprocessing
import random
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hessianflow.data import AdaptiveBatches
from hessianflow.interfaces import HessianFlowError, ResizableBatches

COUNT = 53
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


class Noisy(Dataset[Any]):
    """An example is its index plus random numbers of all three libraries."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(
            [float(index), random.random(), np.random.rand(), torch.rand(()).item()]
        ), index


def make(batch_size: int = 10, **options: Any) -> AdaptiveBatches:
    return AdaptiveBatches(
        Noisy(), batch_size, **{"seed": 3, "chunk_size": 4, "prefetch_examples": 16, **options}
    )


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_it_is_what_the_trainer_asks_for() -> None:
    batches: ResizableBatches = make()
    assert batches.num_examples == COUNT


@WORKERS
def test_epochs_visit_every_example_once(num_workers: int) -> None:
    batches = make(num_workers=num_workers)
    first, second = joined(batches), joined(batches)
    for inputs, targets in (first, second):
        assert sorted(targets.tolist()) == list(range(COUNT))
        assert torch.equal(inputs[:, 0], targets.float())
    assert not torch.equal(first[1], second[1])
    # transforms vary by epoch
    assert not torch.equal(first[0][first[1].argsort()], second[0][second[1].argsort()])


def test_workers_change_nothing() -> None:
    alone, helped = (joined(make(num_workers=workers)) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@WORKERS
def test_a_new_size_holds_from_the_very_next_batch_without_new_workers(num_workers: int) -> None:
    batches, seen, parts = make(num_workers=num_workers), [], []
    workers: set[int] = set()
    for batch in batches:
        parts.append(batch)
        seen.append(len(batch[1]))
        workers |= {process.pid for process in getattr(batches._chunks, "_workers", [])}
        batches.set_batch_size([3, 17, 1, 30, 50][len(seen) - 1])
    assert seen == [10, 3, 17, 1, 22]
    assert len(workers) == num_workers
    assert all(torch.equal(a, b) for a, b in zip(joined(parts), joined(make()), strict=True))


@WORKERS
@pytest.mark.parametrize("stop_after", [1, 4, 6, 8])
def test_resuming_anywhere_equals_going_on(stop_after: int, num_workers: int) -> None:
    first, resumed, whole = make(), make(7, num_workers=num_workers), make()
    expected = [*whole, *whole]
    head = list(itertools.islice(itertools.chain(first, first), stop_after))
    next(iter(resumed))  # what it loaded ahead must not survive the new state
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed)
    while resumed.epoch < 2:
        rest += list(resumed)
    assert [len(targets) for _, targets in head + rest] == [len(targets) for _, targets in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(joined(head + rest), joined(expected), strict=True)
    )


def test_leaving_a_loop_early_goes_on_where_it_stopped() -> None:
    batches = make()
    head = list(itertools.islice(batches, 2))
    assert torch.equal(joined(head + list(batches))[0], joined(make())[0])


def test_a_stream_left_in_an_epoch_is_freed_at_once_with_its_workers() -> None:
    """In a cycle, as with the traceback of an interrupted run: torch alone waits 5 s for each
    worker."""
    before = multiprocessing.active_children()
    batches = make(num_workers=2, prefetch_examples=4)
    iterator = iter(batches)
    next(iterator)
    workers = [worker for worker in multiprocessing.active_children() if worker not in before]
    assert len(workers) == 2
    cycle: list[Any] = [batches, iterator]
    cycle.append(cycle)
    del batches, iterator, cycle
    started = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - started < 4
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals cannot be waited for here")
def test_workers_go_on_when_somebody_else_ends_all_processes_of_a_job() -> None:
    """A scheduler sends SIGTERM to workers, too; another process stands in for it. Their parent's
    ends them."""
    before = multiprocessing.active_children()
    batches = make(num_workers=2)
    head = list(itertools.islice(batches, 2))
    workers = [worker for worker in multiprocessing.active_children() if worker not in before]
    pids = [str(worker.pid) for worker in workers]
    for _ in range(2):
        subprocess.run(["kill", "-TERM", *pids], check=True)
    assert torch.equal(joined(head + list(batches))[0], joined(make())[0])
    iterator = iter(batches)
    next(iterator)
    last = [worker for worker in multiprocessing.active_children() if worker not in before][-1]
    last.terminate()
    last.join(timeout=10)
    assert last.exitcode == 0


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_share_every_batch_through_a_change_of_size(world_size: int) -> None:
    def run(batches: AdaptiveBatches) -> list[tuple[Tensor, Tensor]]:
        out = []
        for batch in batches:
            out.append(batch)
            batches.set_batch_size(5 if len(out) < 3 else 14)
        return out  # type: ignore[return-value]

    whole, ranks = run(make()), []
    for rank in range(world_size):
        batches = make()
        batches.set_shard(rank, world_size)
        ranks.append(run(batches))
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, joined(parts), strict=True))


def test_loading_leaves_the_global_generators_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr,index]
    batches = make()
    joined(batches)
    batches.sample(5)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr,index]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_are_restored_when_the_data_set_raises() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise RuntimeError(f"no example {torch.rand(())}")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no example"):
        next(iter(AdaptiveBatches(Broken(), 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_fixed_and_does_not_move_the_stream() -> None:
    batches = make()
    state = batches.state_dict()
    inputs, targets = batches.sample(6, seed=1)
    again, _ = make(3).sample(6, seed=1)
    assert torch.equal(inputs, again)
    assert len(targets.unique()) == 6
    assert batches.state_dict() == state


def test_transform_and_value_range_are_used() -> None:
    ends = torch.zeros(()), torch.ones(())
    batches = make(transform=lambda batch: (batch[0] * 2, batch[1]), value_range=ends)
    assert torch.equal(next(iter(batches))[0], next(iter(make()))[0] * 2)
    assert batches.value_range == ends
    assert batches.device == torch.device("cpu")


Pair = namedtuple("Pair", "left right")


def test_structures_are_joined_from_chunks() -> None:
    class Structured(Noisy):
        def __getitem__(self, index: int) -> Any:
            value = torch.tensor(index)
            return {"a": value, "b": [value + 1]}, Pair(value + 2, (value + 3,))

    inputs, targets = next(iter(AdaptiveBatches(Structured(), 9, chunk_size=4, shuffle=False)))
    base = torch.arange(9)
    assert torch.equal(inputs["a"], base)
    assert torch.equal(inputs["b"][0], base + 1)
    assert type(targets) is Pair
    assert torch.equal(targets.left, base + 2)
    assert torch.equal(targets.right[0], base + 3)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Counted(Endless):
    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize("kind", [Endless, Counted])
def test_an_iterable_data_set_is_refused_with_a_length_or_without(kind: type[Endless]) -> None:
    with pytest.raises(
        HessianFlowError,
        match=rf"map-style, .* got {kind.__name__}: use hf.data.StreamBatches for an iterable",
    ):
        AdaptiveBatches(kind(), 2)


@pytest.mark.parametrize(
    ("name", "value"), [("num_workers", -1), ("chunk_size", 0), ("prefetch_examples", 0)]
)
def test_numbers_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(HessianFlowError, match=f"{name} must be at least .*, got {value}"):
        make(**{name: value})
