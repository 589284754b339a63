"""Batches of iterable data: their sizes, their order after resuming, ranks, workers and errors.

The oracle is the list of what the source gives, and the sizes of `AdaptiveBatches` on as many.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from hessianflow.batches import num_examples
from hessianflow.data import AdaptiveBatches, StreamBatches
from hessianflow.interfaces import HessianFlowError, ResizableBatches, Rewindable, TellsPlace

COUNT = 103
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def example(n: int) -> tuple[Tensor, int]:
    return torch.tensor([n, -n]), n


class Counting(IterableDataset):
    """Examples in an order that depends on the pass, shared out to workers."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.epoch = 0
        self.starts = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return torch.randperm(self.count, generator=generator).tolist()

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        info = get_worker_info()
        order = self.order()
        if info is not None:
            order = order[info.id :: info.num_workers]
        return map(example, order)


class WithState(Counting):
    """The same examples with a state that continues where it stands, as those of torchdata do."""

    place = 0
    loads = 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        order = self.order()
        while self.place < self.count:
            self.place += 1
            yield example(order[self.place - 1])
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loads += 1
        self.place = state["place"]


def loader(count: int = COUNT) -> DataLoader:
    inputs, targets = zip(*map(example, range(count)), strict=True)
    return DataLoader(
        TensorDataset(torch.stack(inputs), torch.tensor(targets)), batch_size=7, shuffle=True
    )


SOURCES = {
    "iterable": (Counting, {}),
    "state": (WithState, {}),
    "list": (lambda: [example(n) for n in range(COUNT)], {}),
    "function": (lambda: lambda: map(example, range(COUNT)), {}),
    "function of the pass": (
        lambda: lambda epoch: (example((n + 7 * epoch) % COUNT) for n in range(COUNT)),
        {},
    ),
    "loader": (loader, {}),
    "batches": (
        lambda: [
            (torch.arange(n, n + 5)[:, None], torch.arange(n, n + 5)) for n in range(0, 95, 5)
        ],
        {"batched": True},
    ),
    "1 worker": (Counting, {"num_workers": 1, "chunk_size": 5}),
    "2 workers": (Counting, {"num_workers": 2, "chunk_size": 5}),
}
EVERY = pytest.mark.parametrize("kind", SOURCES)


def make(kind: str, batch_size: int = 10, **options: Any) -> StreamBatches:
    source, own = SOURCES[kind]
    return StreamBatches(source(), batch_size, **{**own, **options})


def seen(batches: Any) -> list[list[int]]:
    return [targets.tolist() for _, targets in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain(*lists))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the state of a source after every chunk."""
    monkeypatch.setattr("hessianflow.data.stream_reader.SNAPSHOT_EXAMPLES", 1)


def test_stream_batches_have_the_interface_that_a_trainer_needs() -> None:
    batches = make("iterable")
    assert isinstance(batches, ResizableBatches)
    assert isinstance(batches, TellsPlace)
    assert isinstance(batches, Rewindable)
    assert batches.num_examples == sys.maxsize
    assert make("iterable", num_examples=COUNT).num_examples == COUNT


@pytest.mark.parametrize("length", [None, "stated"])
def test_sizes_are_those_of_data_of_known_length(length: str | None) -> None:
    for count, size in itertools.product([1, 2, 3, 7, 40, 41, 44, 45, 46, 49], [1, 2, 3, 10, 40]):
        data = [example(n) for n in range(count)]
        if size > count:
            continue
        stated = count if length else None
        mine = seen(StreamBatches(data, size, num_examples=stated))
        assert flat(mine) == list(range(count))
        assert list(map(len, mine)) == list(map(len, seen(AdaptiveBatches(data, size))))


@EVERY
def test_every_example_comes_once_in_each_pass(kind: str) -> None:
    batches = make(kind)
    passes = []
    for epoch in range(3):
        assert (batches.epoch, batches.cursor) == (epoch, 0)
        passes.append(flat(seen(batches)))
    count = 95 if kind == "batches" else COUNT
    assert all(sorted(numbers) == list(range(count)) for numbers in passes)
    shuffles = kind not in ("list", "function", "batches")
    assert (passes[0] != passes[1]) == shuffles
    again = make(kind)
    assert [flat(seen(again)) for _ in range(3)] == passes


@EVERY
@pytest.mark.parametrize("stop", [0, 1, 4, 7, 11, 14, 20])
def test_a_resumed_stream_continues_at_another_size(often: None, kind: str, stop: int) -> None:
    def drawn(batches: StreamBatches, updates: int, start: int = 0) -> Iterator[Any]:
        """Batches whose size grows with their number, over the ends of passes."""
        iterator = iter(batches)
        for update in range(start, updates):
            batches.set_batch_size(3 + update)
            batch = next(iterator, None)
            if batch is None:
                iterator = iter(batches)
                batch = next(iterator)
            yield batch

    whole = list(drawn(make(kind), 24))
    first = make(kind)
    begun = list(drawn(first, stop))
    state = first.state_dict()
    second = make(kind)
    second.load_state_dict(state)
    resumed = [*begun, *drawn(second, 24, stop)]
    assert seen(resumed) == seen(whole)
    for (a, _), (b, _) in zip(resumed, whole, strict=True):
        assert torch.equal(a, b)
    assert second.state_dict()["at"] == [second.epoch, second.cursor]


def test_a_state_of_the_data_is_used_and_little_is_read_again(often: None) -> None:
    first = StreamBatches(WithState(1000), 10, chunk_size=8)
    expected = seen(first)
    first = StreamBatches(WithState(1000), 10, chunk_size=8)
    iterator = iter(first)
    begun = [next(iterator)[1].tolist() for _ in range(70)]
    state = first.state_dict()
    assert 690 <= state["source"][0] < 700
    source = WithState(1000)
    second = StreamBatches(source, 10, chunk_size=8)
    second.load_state_dict(state)
    assert begun + seen(second) == expected
    assert source.loads == 1


@EVERY
@pytest.mark.parametrize("length", [None, "stated"])
def test_a_stream_goes_back_to_an_earlier_place(kind: str, length: str | None) -> None:
    count = 95 if kind == "batches" else COUNT
    batches = make(kind, num_examples=count if length else None)
    expected = seen(batches)
    batches = make(kind, num_examples=count if length else None)
    iterator = iter(batches)
    next(iterator)
    place = batches.state_dict()
    next(iterator)
    for _ in range(2):  # back by one batch, then by two
        batches.load_state_dict({**batches.state_dict(), "cursor": place["cursor"]})
        iterator = iter(batches)
        assert next(iterator)[1].tolist() == expected[1]
        assert next(iterator)[1].tolist() == expected[2]
    batches.rewind()
    assert seen(batches) == expected


@EVERY
def test_a_sample_is_read_ahead_and_loses_no_example(kind: str) -> None:
    expected = seen(make(kind))
    batches = make(kind)
    iterator = iter(batches)
    first = next(iterator)[1].tolist()
    assert batches.sample(25)[1].tolist() == flat(expected)[10:35]
    assert batches.cursor == 10
    assert [first, *seen(iterator)] == expected
    with pytest.raises(HessianFlowError, match=r"count must not exceed the \d+ examples"):
        batches.sample(1000)


@EVERY
@pytest.mark.parametrize("length", [None, "stated"])
def test_ranks_take_the_shards_of_one_stream(kind: str, length: str | None) -> None:
    count = 95 if kind == "batches" else COUNT
    stated = count if length else None
    expected = seen(make(kind, num_examples=stated))
    parts = []
    for rank in range(3):
        batches = make(kind, num_examples=stated)
        batches.set_shard(rank, 3)
        parts.append(seen(batches))
    assert [flat(list(shards)) for shards in zip(*parts, strict=True)] == expected
    assert [len(part[0]) for part in parts] == [3, 3, 4]


def test_a_rank_may_get_an_empty_shard() -> None:
    batches = make("iterable", 2)
    batches.set_shard(0, 3)
    inputs, targets = next(iter(batches))
    assert inputs.shape == (0, 2)
    assert targets.shape == (0,)


def test_ranks_with_parts_of_their_own_make_equally_many_batches() -> None:
    def part(rank: int) -> list[Any]:
        return [example(n) for n in range(rank, 1000, 3)]

    parts = []
    for rank in range(3):
        batches = StreamBatches(part(rank), 10, num_examples=100, sharded=True)
        batches.set_shard(rank, 3)
        parts.append([*seen(batches), *seen(batches)])
        if rank == 1:
            iterator = iter(batches)
            next(iterator)
            state = batches.state_dict()
            expected = next(iterator)[1]
    assert all(len(part) == 20 for part in parts)
    assert sorted(flat(flat(parts))) == list(range(200))
    assert all(max(map(len, shares)) <= 4 for shares in zip(*parts, strict=True))
    again = StreamBatches(part(1), 10, num_examples=100, sharded=True)
    again.set_shard(1, 3)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))[1], expected)
    again = StreamBatches(part(1), 10, num_examples=100, sharded=True)
    with pytest.raises(HessianFlowError, match="had 3 as ranks with parts of their own, this one"):
        again.load_state_dict(state)
    short = StreamBatches(part(1)[:20], 10, num_examples=100, sharded=True)
    short.set_shard(1, 3)
    with pytest.raises(HessianFlowError, match=r"ended early, after 20 examples \(those of rank 1"):
        seen(short)
    with pytest.raises(HessianFlowError, match="sharded=True needs num_examples"):
        StreamBatches(part(0), 10, sharded=True)


def test_endless_data_are_read_on_in_the_next_pass() -> None:
    batches = StreamBatches(lambda: map(example, itertools.count()), 10, num_examples=30)
    assert flat(seen(batches)) == list(range(30))
    iterator = iter(batches)
    assert next(iterator)[1].tolist() == list(range(30, 40))
    again = StreamBatches(lambda: map(example, itertools.count()), 10, num_examples=30)
    again.load_state_dict(batches.state_dict())
    assert flat(seen(again)) == list(range(40, 60))
    assert flat(seen(again)) == list(range(60, 90))


def test_batches_are_joined_by_rows() -> None:
    data = [
        {"ids": torch.arange(n, n + 3), "names": [f"n{i}" for i in range(n, n + 3)], "scale": 2.0}
        for n in range(0, 30, 3)
    ]
    batches = list(StreamBatches(data, 7, batched=True))
    assert [num_examples(batch) for batch in batches] == [7, 7, 7, 5, 4]
    for batch in batches:
        assert batch["names"] == [f"n{i}" for i in batch["ids"].tolist()]
        assert batch["scale"] == 2.0
    ragged = [torch.zeros(4, 17), torch.zeros(4, 23)]
    with pytest.raises(HessianFlowError, match=r"has the shapes \[4, 17\] and \[\d, 23\], which"):
        list(StreamBatches([(x, torch.zeros(4)) for x in ragged], 8, batched=True))
    shared = [{"ids": torch.zeros(4), "scale": n} for n in range(2)]
    with pytest.raises(HessianFlowError, match=r"batch\['scale'\] has no row for each example and"):
        list(StreamBatches(shared, 8, batched=True))


@WORKERS
def test_a_collate_fn_receives_the_whole_batch(num_workers: int) -> None:
    def padded(items: list[Any]) -> Any:
        return torch.nn.utils.rnn.pad_sequence(items, batch_first=True), torch.tensor(
            [len(item) for item in items]
        )

    class Sequences(Counting):
        def __iter__(self) -> Iterator[Any]:
            return (torch.ones(1 + n % 9) for _, n in super().__iter__())

    batches = StreamBatches(Sequences(), 10, collate_fn=padded, num_workers=num_workers)
    batches.check_rows()
    count = 0
    for inputs, lengths in batches:
        assert inputs.shape == (len(lengths), lengths.max())
        count += len(lengths)
    assert count == COUNT


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_are_started_once_or_in_every_pass(persistent_workers: bool) -> None:
    class Pids(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return ((torch.tensor(os.getpid()), torch.initial_seed() % 1000) for _ in range(20))

    started = torch.zeros(2, dtype=torch.int64).share_memory_()

    def init(number: int) -> None:
        started[number] += 1

    batches = StreamBatches(
        Pids(),
        10,
        num_workers=2,
        persistent_workers=persistent_workers,
        worker_init_fn=init,
    )
    pids = [set(flat([inputs.tolist() for inputs, _ in batches])) for _ in range(2)]
    assert all(len(numbers) == 2 and os.getpid() not in numbers for numbers in pids)
    assert (pids[0] == pids[1]) == persistent_workers
    assert started.tolist() == ([1, 1] if persistent_workers else [2, 2])


def test_batches_are_transformed_and_collate_fn_repeats_its_draws() -> None:
    def noisy(items: list[Any]) -> Any:
        return torch.rand(len(items)), torch.tensor([n for _, n in items])

    def doubled(batch: Any) -> Any:
        return 2 * batch[0], batch[1]

    batches = make("iterable", collate_fn=noisy, transform=doubled)
    first = list(batches)
    torch.rand(3)
    iterator = iter(again := make("iterable", collate_fn=noisy, transform=doubled))
    for _ in range(3):
        next(iterator)
    resumed = make("iterable", collate_fn=noisy, transform=doubled)
    resumed.load_state_dict(again.state_dict())
    for (a, _), (b, _) in zip(resumed, first[3:], strict=True):
        assert torch.equal(a, b)
    assert max(float(inputs.max()) for inputs, _ in first) > 1


def test_reading_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    seen(make("loader"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_source_that_failed_is_read_on_from_the_same_place() -> None:
    failures = iter([True])

    def source() -> Iterator[Any]:
        for n in range(COUNT):
            if n == 43 and next(failures, False):
                raise OSError("the disk is gone")
            yield example(n)

    batches = StreamBatches(source, 10)
    got = []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(targets.tolist() for _, targets in batches)
    assert flat(got + seen(batches)) == list(range(COUNT))
    broken = StreamBatches((example(n) if n < 43 else 1 // 0 for n in range(COUNT)), 10)
    with pytest.raises(ZeroDivisionError):
        seen(broken)
    with pytest.raises(HessianFlowError, match="a generator cannot be started again"):
        seen(broken)


def test_a_batch_that_could_not_be_made_comes_next_again() -> None:
    failures = iter([False, True])

    def transform(batch: Any) -> Any:
        if next(failures, False):
            raise KeyboardInterrupt
        return batch

    batches = make("list", transform=transform)
    iterator = iter(batches)
    next(iterator)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert batches.cursor == 10
    assert next(iter(batches))[1].tolist() == list(range(10, 20))


@pytest.mark.parametrize("stated", [None, 10])
def test_an_empty_stream_is_refused(stated: int | None) -> None:
    with pytest.raises(HessianFlowError, match=r"the stream list is empty: at least one example"):
        seen(StreamBatches([], 4, num_examples=stated))
    spent = iter([example(0)])
    next(spent)
    with pytest.raises(HessianFlowError, match="that was read before gives nothing more"):
        seen(StreamBatches(spent, 4, num_examples=stated))


def test_a_stream_that_ends_early_is_refused() -> None:
    message = r"the stream Counting ended early, after 103 examples .* and 100 of the 200 that num"
    with pytest.raises(HessianFlowError, match=message):
        seen(make("iterable", num_examples=200))
    batches = make("iterable", num_examples=100)
    assert len(flat(seen(batches))) == 100
    with pytest.raises(
        HessianFlowError, match=r"and 0 of the 100 that num_examples states for pas"
    ):
        seen(batches)


def test_a_generator_gives_one_pass_and_is_resumed_by_a_new_one() -> None:
    batches = StreamBatches(map(example, range(COUNT)), 10)
    expected = seen(batches)
    assert flat(expected) == list(range(COUNT))
    with pytest.raises(HessianFlowError, match="cannot be started again, neither for another pass"):
        seen(batches)
    first = StreamBatches(map(example, range(COUNT)), 10)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    second = StreamBatches(map(example, range(COUNT)), 10)
    second.load_state_dict(state)
    assert seen(second) == expected[4:]
    with pytest.raises(HessianFlowError, match="cannot be started again, neither for another pass"):
        first.rewind()


@WORKERS
def test_ragged_items_are_refused_with_both_shapes(num_workers: int) -> None:
    class Ragged(Counting):
        def __iter__(self) -> Iterator[Any]:
            return ((torch.ones(3 + (n > 50)), n) for n in range(COUNT))

    message = r"tensors of different sizes, \[3\] and \[4\]\): pass a collate_fn"
    with pytest.raises(HessianFlowError, match=message):
        seen(StreamBatches(Ragged(), 40, num_workers=num_workers))


def test_a_worker_that_dies_is_named() -> None:
    class Deadly(Counting):
        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                if item[1] == 50:
                    os._exit(3)
                yield item

    with pytest.raises(HessianFlowError, match=r"a worker of the stream .*Deadly died \(DataLoad"):
        seen(StreamBatches(Deadly(), 10, num_workers=1))


def test_states_of_other_streams_are_refused() -> None:
    state = make("iterable").state_dict()
    for other, message in (
        (make("list"), "had 'Counting' as source, this one has 'list': make it as"),
        (make("iterable", num_examples=COUNT), "had None as num_examples, this one has 103"),
        (make("2 workers"), r"had None as workers and chunk_size, this one has \[2, 5\]"),
    ):
        with pytest.raises(HessianFlowError, match=message):
            other.load_state_dict(state)
    with pytest.raises(HessianFlowError, match="this is not a state of a stream: it lacks lap"):
        make("list").load_state_dict(AdaptiveBatches([example(0)], 1).state_dict())
    with pytest.raises(HessianFlowError, match="got epoch -1, cursor 0: the state is damaged"):
        make("iterable").load_state_dict({**state, "epoch": -1})
    short = StreamBatches(Counting(20), 5)
    batches = make("iterable")
    iterator = iter(batches)
    for _ in range(5):
        next(iterator)
    short.load_state_dict(batches.state_dict())
    with pytest.raises(HessianFlowError, match="Counting ended after 20 examples, before example"):
        seen(short)


def test_a_warning_tells_of_an_order_that_is_not_reproducible() -> None:
    first = StreamBatches([example(n) for n in range(COUNT)], 10)
    next(iter(first))
    second = StreamBatches([example(n) for n in reversed(range(COUNT))], 10)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="example 9 of list differs from the one that was there"):
        next(iter(second))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": 3},
            "dataset must be iterable data, or a function that makes an iterator, got",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"num_examples": 3}, "batch_size must not exceed the 3 examples of a pass, got 4"),
        ({"num_examples": 0}, "num_examples must be at least 1, or None if it is unknown, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batched": True, "collate_fn": list}, "collate_fn makes a batch of single examples, but"),
        ({"dataset": loader(), "num_workers": 1}, "num_workers must be 0 for a DataLoader, got 1"),
        ({"dataset": iter([1]), "num_workers": 1}, "num_workers must be 0 for a list_iterator"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        StreamBatches(**{"dataset": [example(0)], "batch_size": 4, **options})


def test_map_style_batches_name_the_way_out() -> None:
    with pytest.raises(HessianFlowError, match=r"use hf\.data\.StreamBatches for an iterable"):
        AdaptiveBatches(Counting(), 4)
