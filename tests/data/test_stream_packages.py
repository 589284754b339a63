"""Streams of Hugging Face datasets, WebDataset and torchdata, resumed through these packages."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from hessianflow.data import StreamBatches

COUNT = 130
pytestmark = [  # what these packages do with torch, and with files that are not read to their end
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the state of a source after every chunk."""
    monkeypatch.setattr("hessianflow.data.stream_reader.SNAPSHOT_EXAMPLES", 1)


def hugging_face(shuffle: bool = False) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    rows = datasets.Dataset.from_dict({"n": list(range(COUNT))}).with_format("torch")
    stream = rows.to_iterable_dataset(num_shards=4)
    return stream.shuffle(seed=3, buffer_size=20) if shuffle else stream


class Plain(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return ({"n": n} for n in range(COUNT))


def stateful(num_workers: int = 0) -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    data = [{"n": n} for n in range(COUNT)]
    torch.manual_seed(0)  # its sampler draws a seed as it is made
    return loaders.StatefulDataLoader(data, batch_size=9, shuffle=True, num_workers=num_workers)


def nodes() -> Any:
    package = pytest.importorskip("torchdata.nodes", reason="needs torchdata")
    return package.Loader(package.IterableWrapper([{"n": n} for n in range(COUNT)]))


def web_dataset(folder: Path) -> Any:
    package = pytest.importorskip("webdataset", reason="needs webdataset")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for n in range(shard, COUNT, 2):
                text = str(n).encode()
                member = tarfile.TarInfo(f"{n:06}.cls")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    urls = str(folder / "{0..1}.tar")
    stream = package.WebDataset(urls, shardshuffle=False).shuffle(10, seed=1).decode()
    return stream.map(lambda item: {"n": item["cls"]})


def seen(batches: Any) -> list[list[int]]:
    return [batch["n"].tolist() for batch in batches]


def check(make: Any, **options: Any) -> dict[str, Any]:
    """Stop at several places, also in the second pass, and compare with an uninterrupted stream."""
    whole = StreamBatches(make(), 10, **options)
    expected = [seen(whole), seen(whole)]
    for numbers in expected:
        assert sorted(n for batch in numbers for n in batch) == list(range(COUNT))
    for passes, stop in ((0, 1), (0, 6), (0, 13), (1, 4)):
        first = StreamBatches(make(), 10, **options)
        for _ in range(passes):
            seen(first)
        iterator = iter(first)
        begun = [next(iterator)["n"].tolist() for _ in range(stop)]
        state = first.state_dict()
        second = StreamBatches(make(), 10, **options)
        second.load_state_dict(state)
        assert begun + seen(second) == expected[passes], (passes, stop)
        if passes == 0:
            assert seen(second) == expected[1]
    return state


def test_hugging_face_streams_continue_from_their_state() -> None:
    assert "source" in check(hugging_face)


def test_shuffled_hugging_face_streams_continue_by_counting() -> None:
    assert "source" not in check(lambda: hugging_face(shuffle=True), by_count=True)


def test_a_warning_tells_of_a_shuffle_buffer_that_would_be_lost() -> None:
    first = StreamBatches(hugging_face(shuffle=True), 10)
    iterator = iter(first)
    for _ in range(8):
        next(iterator)
    second = StreamBatches(hugging_face(shuffle=True), 10)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="use by_count=True"):
        next(iter(second))


@pytest.mark.slow
def test_hugging_face_streams_are_divided_among_workers() -> None:
    check(hugging_face, num_workers=2, chunk_size=7)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stateful_loaders_continue_from_their_state(num_workers: int) -> None:
    assert "source" in check(lambda: stateful(num_workers))


@pytest.mark.slow
def test_nodes_of_torchdata_continue_from_their_state() -> None:
    check(nodes)


def test_web_datasets_continue_by_counting(tmp_path: Path) -> None:
    assert "source" not in check(lambda: web_dataset(tmp_path))


def test_states_are_plain_enough_for_a_checkpoint(tmp_path: Path) -> None:
    for number, make in enumerate((hugging_face, stateful)):
        first = StreamBatches(make(), 10)
        iterator = iter(first)
        for _ in range(5):
            next(iterator)
        path = tmp_path / str(number)
        torch.save(first.state_dict(), path)
        second = StreamBatches(make(), 10)
        second.load_state_dict(torch.load(path, weights_only=True))
        assert seen(second) == seen(iterator)
