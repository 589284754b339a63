"""Trainers over streams of unknown length: batches grow, and runs are stopped and resumed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

import hessianflow as hf
from hessianflow.interfaces import Progress

COUNT = 150


class Noise(IterableDataset):
    """Features and classes, drawn in an order of their own in each pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        generator = torch.Generator().manual_seed(self.epoch)
        inputs = torch.randn(COUNT, 4, generator=generator)
        for number, row in enumerate(inputs):
            if info is None or number % info.num_workers == info.id:
                yield row, int(row.sum() > 0)


class Remembered(Noise):
    """The same examples with a state of their own."""

    place = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        every = list(super().__iter__())
        while self.place < COUNT:
            self.place += 1
            yield every[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Stop:
    """A transform that asks the run to stop after some updates."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.trainer: Any = None

    def __call__(self, inputs: Tensor, targets: Tensor, progress: Progress) -> Any:
        if progress.updates == self.after:
            self.trainer.request_stop()
        return inputs, targets


def trainer(data: Any, stop: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    transform = Stop(stop)
    transform.trainer = hf.AdaptiveBatchTrainer(
        model,
        data,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=3,
        controller=hf.control.AdaBatch(8, 64, every_epochs=1),
        transform=transform,
        **options,
    )
    return transform.trainer


@pytest.mark.parametrize("source", [Noise, Remembered])
@pytest.mark.parametrize("length", [None, COUNT])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: type[Noise],
    length: int | None,
    num_workers: int,
) -> None:
    monkeypatch.setattr("hessianflow.data.stream_reader.SNAPSHOT_EXAMPLES", 10)
    if source is Remembered and num_workers:
        pytest.skip("its examples are not shared out to workers")

    def data() -> hf.data.StreamBatches:
        return hf.data.StreamBatches(
            source(), 8, num_examples=length, num_workers=num_workers, chunk_size=5
        )

    whole = trainer(data())
    history = whole.fit()
    sizes = [row["to"] for row in history.records if row["kind"] == "batch"]
    assert sizes == [16, 32]
    assert [row["examples"] for row in history.records if row["kind"] == "epoch"] == [150, 300, 450]
    for stop in (5, 18, 20, 31):
        first = trainer(data(), stop)
        first.fit()
        torch.save(first.state_dict(), tmp_path / "state.pt")
        resumed = trainer(data())
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        resumed.fit()
        assert resumed.progress == whole.progress
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), (stop, name)


def test_a_run_in_a_folder_is_resumed(tmp_path: Path) -> None:
    def data() -> hf.data.StreamBatches:
        return hf.data.StreamBatches(Remembered(), 8, num_examples=COUNT)

    whole = trainer(data())
    whole.fit()
    trainer(data(), 18, run_dir=tmp_path / "run").fit()
    resumed = trainer(data(), run_dir=tmp_path / "run")
    resumed.resume(tmp_path / "run")
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_probe_of_the_stream_takes_no_example_from_it() -> None:
    without = trainer(hf.data.StreamBatches(Noise(), 8))
    without.fit()
    data = hf.data.StreamBatches(Noise(), 8)
    data.sample(40)
    next(iter(data))  # training begins with the first example even so
    sampled = trainer(data)
    sampled.fit()
    for one, other in zip(without.model.parameters(), sampled.model.parameters(), strict=True):
        assert torch.equal(one, other)
