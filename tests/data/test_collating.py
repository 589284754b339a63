"""A `collate_fn` makes every batch from all of its items, whatever it returns and whoever loads."""

import itertools
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from hessianflow.data import AdaptiveBatches
from hessianflow.data.loading import Packed
from hessianflow.interfaces import HessianFlowError

COUNT = 53
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def sequences() -> list[tuple[Tensor, int]]:
    """Example n has 1 + 7 n mod 13 entries, all n."""
    return [(torch.full((1 + 7 * n % 13,), n), n) for n in range(COUNT)]


def padded(items: list[Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*items, strict=True)
    return pad_sequence(list(inputs), batch_first=True, padding_value=-1), torch.tensor(targets)


def make(dataset: Any, batch_size: int = 10, **options: Any) -> AdaptiveBatches:
    return AdaptiveBatches(
        dataset, batch_size, **{"seed": 3, "chunk_size": 4, "prefetch_examples": 16, **options}
    )


@WORKERS
def test_a_batch_is_padded_to_its_own_longest(num_workers: int) -> None:
    """The oracle collates the same examples by hand; sizes change, most are no multiple of a
    chunk."""
    data, sizes = sequences(), itertools.cycle([10, 3, 17, 1])
    batches, seen = make(data, next(sizes), collate_fn=padded, num_workers=num_workers), []
    for inputs, targets in batches:
        expected = padded([data[n] for n in targets.tolist()])
        assert torch.equal(inputs, expected[0])
        seen.append(targets)
        batches.set_batch_size(next(sizes))
    assert [len(targets) for targets in seen] == [10, 3, 17, 1, 10, 3, 9]
    assert torch.equal(
        torch.cat(seen), torch.cat([targets for _, targets in make(data, 53, collate_fn=padded)])
    )


@WORKERS
def test_the_order_is_that_of_the_default_collate(num_workers: int) -> None:
    data = [(torch.tensor([n]), n) for n in range(COUNT)]
    plain = list(make(data, num_workers=num_workers))
    for collate in (default_collate, lambda items: default_collate(items)):
        for (a, b), (c, d) in zip(
            plain, make(data, collate_fn=collate, num_workers=num_workers), strict=True
        ):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


@WORKERS
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dicts_come_out_as_they_are_made(kind: type, num_workers: int) -> None:
    def collate(items: list[Any]) -> Any:
        return kind(
            {
                "ids": torch.stack([i["ids"] for i in items]),
                "mask": torch.ones(4, 4),
                "n": len(items),
            }
        )

    data = [{"ids": torch.tensor([n, n]), "label": n} for n in range(COUNT)]
    batches = make(data, collate_fn=collate, num_workers=num_workers)
    for batch in (next(iter(batches)), batches.sample(10)):
        assert type(batch) is kind
        assert batch["ids"].shape == (10, 2)
        assert batch["mask"].shape == (4, 4)
        assert batch["n"] == 10


@WORKERS
def test_dict_items_are_stacked_and_joined_without_a_collate(num_workers: int) -> None:
    data = [UserDict(ids=torch.tensor([n, n]), label=n, name=f"example {n}") for n in range(COUNT)]
    batches = make(data, num_workers=num_workers)
    seen = []
    for batch in itertools.chain(batches, [batches.sample(7)]):
        assert type(batch) is UserDict
        assert torch.equal(batch["ids"][:, 0], batch["label"])
        assert list(batch["name"]) == [f"example {n}" for n in batch["label"].tolist()]
        seen.append(len(batch["label"]))
    assert seen == [10, 10, 10, 10, 7, 6, 7]  # of 13 that were left the last two share


@WORKERS
def test_detection_batches_keep_images_and_targets_apart(num_workers: int) -> None:
    data = [
        (torch.full((3, 4 + n % 3, 5), n), {"boxes": torch.full((n % 4, 4), n), "id": n})
        for n in range(COUNT)
    ]
    collate = lambda items: tuple(zip(*items, strict=True))  # noqa: E731
    seen = []
    for images, targets in make(data, 8, collate_fn=collate, num_workers=num_workers):
        assert len(images) == len(targets)
        for image, target in zip(images, targets, strict=True):
            assert image.shape == (3, 4 + target["id"] % 3, 5)
            assert target["boxes"].shape == (target["id"] % 4, 4)
            assert (image == target["id"]).all()
            seen.append(target["id"])
    assert sorted(seen) == list(range(COUNT))


@dataclass
class Record:
    x: Tensor
    name: str


@WORKERS
def test_items_may_be_anything_a_collate_understands(num_workers: int) -> None:
    def collate(items: list[Record]) -> Record:
        return Record(
            torch.stack([item.x for item in items]), "+".join(item.name for item in items)
        )

    data = [Record(torch.tensor([float(n)]), str(n)) for n in range(COUNT)]
    batches = make(data, collate_fn=collate, num_workers=num_workers)
    for batch in itertools.chain(batches, [batches.sample(5)]):
        assert type(batch) is Record
        assert batch.name.split("+") == [str(int(x)) for x in batch.x[:, 0]]


@pytest.mark.parametrize(
    ("item", "sampled"),
    [
        (lambda n: torch.tensor([n, n]), lambda b: b[:, 0]),
        (lambda n: (torch.tensor([n, n]),), lambda b: b[0][:, 0]),
        (lambda n: (torch.tensor([n, n]), n, 1.0), lambda b: b[1]),
        (lambda n: n, lambda b: b),
    ],
)
def test_items_that_are_no_pairs_are_batched_all_the_same(item: Any, sampled: Any) -> None:
    batches = make([item(n) for n in range(COUNT)])
    assert sorted(torch.cat([sampled(batch) for batch in batches]).tolist()) == list(range(COUNT))
    assert len(sampled(batches.sample(4))) == 4


@WORKERS
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            lambda n: (torch.zeros(1 + n), n),
            r"a tuple cannot be stacked to a batch \(.*of different sizes.*\): pass a collate_fn",
        ),
        (
            lambda n: (None, n),
            r"a tuple cannot be stacked to a batch \(.*NoneType.*\): pass a collate_fn",
        ),
        (
            lambda n: Record(torch.zeros(1), "a"),
            r"a Record cannot be stacked to a batch .*: pass a collate_fn",
        ),
        (lambda n: {f"key{n}": 1}, r"a dict cannot be stacked to a batch"),
    ],
)
def test_items_that_cannot_be_stacked_are_refused_in_one_line(
    item: Any, message: str, num_workers: int
) -> None:
    with pytest.raises(HessianFlowError, match=message) as caught:
        next(iter(make([item(n) for n in range(COUNT)], num_workers=num_workers)))
    assert "\n" not in str(caught.value)


class Refusing(Dataset[Any]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        raise HessianFlowError("image 7 is damaged: fetch it again")


def test_what_a_worker_refuses_is_one_line_here() -> None:
    with pytest.raises(HessianFlowError, match=r"^image 7 is damaged: fetch it again$"):
        next(iter(make(Refusing(), num_workers=1)))


def masked(items: list[Any]) -> tuple[Tensor, Tensor]:
    """As for masked language models: a random part of each sequence is hidden."""
    inputs, targets = padded(items)
    return torch.where(torch.rand(inputs.shape) < 0.5, -7, inputs) + int(
        np.random.randint(100)
    ) * 1000, targets


@WORKERS
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_random_collate_is_repeated_exactly_by_a_resumed_run(
    stop_after: int, num_workers: int
) -> None:
    first, whole = (make(sequences(), collate_fn=masked) for _ in range(2))
    resumed = make(sequences(), 7, collate_fn=masked, num_workers=num_workers)
    expected = [*whole, *whole]
    head = list(itertools.islice(itertools.chain(first, first), stop_after))
    resumed.load_state_dict(first.state_dict())
    state = torch.get_rng_state()
    rest = list(resumed)
    assert torch.equal(torch.get_rng_state(), state)
    while resumed.epoch < 2:
        rest += list(resumed)
    for (a, b), (c, d) in zip(head + rest, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(expected[0][0], first.examples(expected[0][1])[0])
    assert len({int(inputs.max()) // 1000 for inputs, _ in expected}) > len(expected) / 2


@pytest.mark.parametrize("world_size", [2, 12])
def test_each_rank_collates_its_own_part(world_size: int) -> None:
    def run(batches: AdaptiveBatches) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches):
            yield batch  # type: ignore[misc]
            batches.set_batch_size(5 if number < 2 else 14)

    data, parts = sequences(), []
    for rank in range(world_size):
        batches = make(data, collate_fn=padded)
        batches.set_shard(rank, world_size)
        parts.append(list(run(batches)))
    for (_, targets), *shares in zip(run(make(data, collate_fn=padded)), *parts, strict=True):
        assert torch.equal(torch.cat([part for _, part in shares]), targets)
        for inputs, part in shares:
            assert len(inputs) == len(part)
            if len(part):
                assert torch.equal(inputs, padded([data[n] for n in part.tolist()])[0])


def test_packed_items_are_unpacked_as_they_were() -> None:
    base = torch.arange(12.0).view(3, 4)
    kinds = [
        base,
        base.t(),
        base[:, ::2],
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex128),
        torch.tensor([7], dtype=torch.uint8),
        base.to_sparse(),
        torch.nn.Parameter(base),
    ]
    items = [
        {"name": str(n), "record": Record(t, "r"), "array": np.arange(n)}
        for n, t in enumerate(kinds)
    ]
    for item, found in zip(items, Packed(items).unpacked(), strict=True):
        assert item["name"] == found["name"]
        assert np.array_equal(item["array"], found["array"])
        before, after = item["record"].x, found["record"].x
        assert (before.dtype, before.layout, type(before)) == (
            after.dtype,
            after.layout,
            type(after),
        )
        assert torch.equal(before.to_dense().detach(), after.to_dense().detach())


@pytest.mark.parametrize("rows", [4, 5, 7, 10])
def test_an_entry_that_is_shared_is_told_from_rows_whatever_its_length(rows: int) -> None:
    """Also where it has as many rows as a batch has examples."""

    def collate(items: list[Any]) -> Any:
        x, y = default_collate(items)
        return {"x": x, "mask": torch.ones(rows, rows)}, y

    data = [(torch.ones(3), n) for n in range(COUNT)]
    with pytest.raises(
        HessianFlowError, match=rf"inputs\['mask'\] has {rows} rows in a batch of [57] examples"
    ):
        make(data, collate_fn=collate).check_rows()


@pytest.mark.parametrize("count", [1, 5, COUNT])
@pytest.mark.parametrize(
    "collate",
    [
        None,
        default_collate,
        lambda items: (
            {"x": default_collate(items)[0], "mask": torch.ones(1, 7, 7)},
            torch.zeros(len(items)),
        ),
        lambda items: tuple(zip(*items, strict=True)),
        lambda items: ([torch.ones(3, 5, 5)] * len(items), torch.zeros(len(items))),
        lambda items: {"x": torch.ones(len(items), 5), "size": (7, 7), "n": len(items)},
    ],
)
def test_batches_that_can_be_cut_pass(collate: Any, count: int) -> None:
    make([(torch.ones(3), n) for n in range(count)], 1, collate_fn=collate).check_rows()
