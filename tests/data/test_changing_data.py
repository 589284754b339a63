"""A data set that changes, fails, or draws from generators of its own: the same with workers as
without."""

import itertools
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hessianflow.data import AdaptiveBatches
from hessianflow.data.randomness import MOST_ENTRIES, generators_of
from hessianflow.interfaces import HessianFlowError

COUNT = 53
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])
COLLATES = pytest.mark.parametrize(
    "collate", [None, lambda items: torch.stack([x for x, _ in items])]
)


class Scaled(Dataset[Any]):
    scale, count = 1.0, COUNT

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index * self.scale]), index


def make(dataset: Any, batch_size: int = 10, **options: Any) -> AdaptiveBatches:
    return AdaptiveBatches(
        dataset, batch_size, **{"seed": 3, "chunk_size": 4, "prefetch_examples": 16, **options}
    )


def inputs_of(batches: Any) -> Tensor:
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in batches])


@WORKERS
@COLLATES
def test_a_change_between_epochs_is_seen(num_workers: int, collate: Any) -> None:
    data = Scaled()
    batches = make(data, num_workers=num_workers, collate_fn=collate)
    assert inputs_of(batches).max() == COUNT - 1
    data.scale = 10.0
    assert inputs_of(batches).max() == 10 * (COUNT - 1)
    batches.load_state_dict({**batches.state_dict(), "cursor": 20})
    data.scale = 2.0
    assert inputs_of(batches).max() <= 2 * (COUNT - 1)


def test_workers_that_are_kept_go_on_with_the_data_set_they_know() -> None:
    data = Scaled()
    batches = make(data, num_workers=1, persistent_workers=True)
    next(iter(batches))
    data.scale = 10.0
    list(batches)
    assert inputs_of(batches).max() == COUNT - 1


@WORKERS
def test_a_data_set_of_another_length_is_refused(num_workers: int) -> None:
    data = Scaled()
    batches = make(data, num_workers=num_workers)
    list(batches)
    data.count = 40
    with pytest.raises(
        HessianFlowError,
        match="the Scaled had 53 examples and now has 40: make a new AdaptiveBatches",
    ):
        next(iter(batches))
    data.count = COUNT
    assert len(inputs_of(batches)) == COUNT


class Flaky(Scaled):
    """Reading the example `bad` fails until it is mended."""

    bad: int | None = None
    error: type[BaseException] = OSError

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise self.error("stale file handle")
        return super().__getitem__(index)


@WORKERS
@COLLATES
@pytest.mark.parametrize("error", [OSError, HessianFlowError, StopIteration])
def test_after_an_error_the_stream_goes_on_where_it_stood(
    num_workers: int, collate: Any, error: Any
) -> None:
    order = inputs_of(make(Scaled())).flatten().tolist()
    data = Flaky()
    data.bad, data.error = int(order[27]), error
    batches, seen = make(data, num_workers=num_workers, collate_fn=collate), []
    for _ in range(2):  # twice: the second try fails at the same place
        with pytest.raises(
            (error, HessianFlowError), match=r"stale file handle|loader ended before"
        ):
            seen.extend(inputs_of([batch]) for batch in batches)
        assert (len(seen), batches.cursor, batches.epoch) == (2, 20, 0)
    data.bad = None
    seen.append(inputs_of(batches))
    assert torch.cat(seen).flatten().tolist() == order
    assert batches.epoch == 1


def test_an_interruption_loses_no_example() -> None:
    """Ctrl-C in a notebook, then the cell again: in this process, where the data are read."""
    order = inputs_of(make(Scaled())).flatten().tolist()
    data = Flaky()
    data.bad, data.error = int(order[13]), KeyboardInterrupt
    batches = make(data)
    first = inputs_of([next(iter(batches))])
    with pytest.raises(KeyboardInterrupt):
        next(iter(batches))
    data.bad = None
    assert torch.cat([first, inputs_of(batches)]).flatten().tolist() == order


def test_a_transform_that_fails_loses_no_example() -> None:
    order, calls = inputs_of(make(Scaled())).flatten().tolist(), []

    def transform(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("odd")
        return batch

    batches = make(Scaled(), transform=transform)
    first = inputs_of([next(iter(batches))])
    with pytest.raises(ValueError, match="odd"):
        next(iter(batches))
    assert torch.cat([first, inputs_of(batches)]).flatten().tolist() == order


class Jitter:
    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(5)

    def __call__(self) -> float:
        return torch.rand((), generator=self.source).item()


class Drawing(Dataset[Any]):
    """Draws from generators of every kind that it holds, some of them deep inside."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.twin = np.random.default_rng(0)
        self.transforms = [random.Random(1).random, {"jitter": Jitter()}]
        self.old = partial(np.random.RandomState(2).uniform, 0, 1)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        draws = [
            self.rng.random(),
            self.twin.random(),
            self.transforms[0](),
            self.transforms[1]["jitter"](),
            self.old(),
        ]
        return torch.tensor(draws, dtype=torch.float64), index


def test_generators_of_the_data_set_draw_alike_whoever_loads() -> None:
    data = Subset(Drawing(), range(COUNT))
    alone, helped = ([*batches, *batches] for batches in (make(data), make(data, 7, num_workers=2)))
    rows = [torch.cat([batch[side] for batch in alone]) for side in (0, 1)]
    others = [torch.cat([batch[side] for batch in helped]) for side in (0, 1)]
    assert torch.equal(rows[0], others[0])
    assert torch.equal(rows[1], others[1])
    for column in rows[0].T:
        # every example, and every epoch, draws a number of its own
        assert len(column.unique()) == 2 * COUNT
    # two generators made from one seed are two
    assert not torch.equal(rows[0][:, 0], rows[0][:, 1])


@WORKERS
def test_generators_of_the_data_set_resume_exactly_and_are_left_as_found(num_workers: int) -> None:
    data, untouched = Drawing(), Drawing()
    first, resumed = make(data), make(data, num_workers=num_workers)
    head = list(itertools.islice(first, 2))
    resumed.load_state_dict(first.state_dict())
    found = inputs_of([*head, *resumed])
    assert torch.equal(found, inputs_of(make(Drawing())))
    assert torch.equal(data[0][0], untouched[0][0])


def test_generators_are_found_within_bounds() -> None:
    class Holder:
        def __init__(self) -> None:
            self.me, self.none, self.text, self.pixels = self, None, "a", np.zeros(5)
            self.many: list[Any] = [str(n) for n in range(10**5)]
            self.module = torch.nn.Dropout()

    holder = Holder()
    assert generators_of(holder) == []
    source = np.random.default_rng(0)
    holder.many[MOST_ENTRIES - 1] = source
    assert generators_of(holder) == [source]
    holder.module.source = source
    assert generators_of(holder) == [source]  # once
    assert generators_of(holder.module.__call__) == [source]


def seen_by(worker: int, path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{worker} {torch.initial_seed()}\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_start_with_a_function_and_seeds_of_the_run(tmp_path: Any, workers: int) -> None:
    """Their seeds depend on the stream's seed and the epoch; a resumed run repeats them."""
    seeds = []
    for name, epochs, skipped in (("whole", 2, 0), ("resumed", 1, 1)):
        path = tmp_path / name
        batches = make(
            Scaled(), num_workers=workers, worker_init_fn=partial(seen_by, path=str(path))
        )
        batches.load_state_dict({**batches.state_dict(), "epoch": skipped})
        for _ in range(epochs):
            list(batches)
        seeds.append(sorted(path.read_text().split("\n")[:-1]))
    assert len(seeds[0]) == len(set(seeds[0])) == 2 * workers
    assert {line.split()[0] for line in seeds[0]} == {str(n) for n in range(workers)}
    assert set(seeds[1]) < set(seeds[0])
