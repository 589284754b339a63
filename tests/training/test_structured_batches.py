"""Batches of dicts, padded sequences and more in the trainer: trained as by hand, or refused before
the first step."""

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import hessianflow as hf
from hessianflow.interfaces import HessianFlowError
from hessianflow.training import Passes, Reporting

N = 64


class Net(nn.Module):
    """Reads its input from whatever holds it, and remembers the masks it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.seen = nn.Linear(4, 3).double(), set[Any]()

    def forward(self, part: Any) -> Tensor:
        if isinstance(part, Tensor):
            return self.linear(part)
        self.seen.add(tuple(part["mask"].shape))
        return self.linear(part["x"] @ part["mask"].view(4, 4))


MASK = torch.ones(4, 4).tril().double()
ITEMS = [
    (torch.randn(4, generator=torch.Generator().manual_seed(n)).double(), n % 3) for n in range(N)
]


def plain(items: list[Any]) -> Any:
    inputs, targets = zip(*items, strict=True)
    return torch.stack(inputs) @ MASK, torch.tensor(targets)


def holding(kind: type, mask: Tensor) -> Any:
    def collate(items: list[Any]) -> Any:
        inputs, targets = zip(*items, strict=True)
        return kind(
            x=torch.stack(inputs), mask=mask, names=[str(n) for n in targets]
        ), torch.tensor(targets)

    return collate


def trainer(
    net: nn.Module, dataset: Any, batch_size: int = 16, collate: Any = None, **options: Any
) -> Any:
    data = hf.data.AdaptiveBatches(dataset, batch_size, collate_fn=collate)
    wanted = {
        "epochs": 2,
        "loss_fn": cross_entropy,
        "reporting": Reporting(show_progress=False),
        **options,
    }
    return hf.AdaptiveBatchTrainer(
        net, data, optimizer=torch.optim.SGD(net.parameters(), lr=0.5), **wanted
    )


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(("size", "microbatch_size"), [(16, None), (32, 8), (24, 5), (64, 16)])
def test_inputs_in_a_mapping_train_as_one_tensor_does(
    kind: type, size: int, microbatch_size: int | None
) -> None:
    """The mask has a first dimension of 1, so every pass gets the whole of it; the oracle applies
    it in the data."""
    ours, oracle = Net(), Net()
    trainer(
        ours, ITEMS, size, holding(kind, MASK[None]), passes=Passes(microbatch_size=microbatch_size)
    ).fit()
    trainer(oracle, ITEMS, size, plain, passes=Passes(microbatch_size=microbatch_size)).fit()
    assert ours.seen == {(1, 4, 4)}
    torch.testing.assert_close(ours.linear.weight, oracle.linear.weight, rtol=1e-13, atol=1e-15)


def test_a_mask_of_another_length_is_whole_or_refused_by_name() -> None:
    net, oracle = Net(), Net()
    trainer(net, ITEMS, 32, holding(dict, MASK)).fit()  # one pass a batch
    trainer(oracle, ITEMS, 32, plain).fit()
    assert net.seen == {(4, 4)}
    torch.testing.assert_close(net.linear.weight, oracle.linear.weight, rtol=1e-13, atol=1e-15)
    growing = hf.control.AdaBatch(16, 64)
    for size, options in (
        (32, {"passes": Passes(microbatch_size=8)}),
        (4, {"passes": Passes(microbatch_size=2)}),
        (16, {"controller": growing}),
    ):
        with pytest.raises(
            HessianFlowError, match=r"inputs\['mask'\] has 4 rows in a batch of 7 .* dimension of 1"
        ):
            trainer(Net(), ITEMS, size, holding(dict, MASK), **options)


@pytest.mark.parametrize(
    ("item", "collate", "message"),
    [
        (
            lambda n: {"x": torch.rand(4), "labels": n % 2},
            None,
            r"pair \(inputs, targets\), got a dict of 2: let each",
        ),
        (lambda n: {"x": torch.rand(4), "m": 1, "labels": n}, None, "got a dict of 3"),
        (
            lambda n: (torch.rand(4), n % 2, 1.0),
            None,
            "got a tuple of 3: let each item of the data set",
        ),
        (lambda n: torch.rand(4), None, "got a Tensor: let each item"),
        (lambda n: (torch.rand(4),), None, "got a tuple of 1"),
        (lambda n: (torch.rand(4), str(n)), lambda items: UserDict(x=items), "got a UserDict of 1"),
        (
            lambda n: (torch.rand(3, 8, 8), {"boxes": torch.rand(1 + n % 4, 4)}),
            lambda items: tuple(zip(*items, strict=True)),
            (
                "targets must be tensors with one row for each example, got a tuple of 16 entries"
                " of type dict: pad them"
            ),
        ),
        (
            lambda n: (torch.rand(5, 4), torch.zeros(5).long()),
            lambda items: (torch.stack([x for x, _ in items]), torch.cat([y for _, y in items])),
            "inputs of 16 rows do not go with targets of 80: both must have one row for each",
        ),
    ],
)
def test_what_is_no_pair_is_refused_before_the_first_step(
    item: Any, collate: Any, message: str
) -> None:
    net = nn.Linear(4, 2)
    before = net.weight.detach().clone()
    with pytest.raises(HessianFlowError, match=message) as caught:
        trainer(net, [item(n) for n in range(40)], collate=collate).fit()
    assert "\n" not in str(caught.value)
    assert torch.equal(net.weight, before)


SEQUENCES = [
    (torch.randn(3 + n % 61, 1, generator=torch.Generator().manual_seed(n)), n % 2)
    for n in range(128)
]


def padded(items: list[Any]) -> Any:
    """Pads to the longest of the batch, and hides a random part of it."""
    inputs, targets = zip(*items, strict=True)
    stacked = pad_sequence(list(inputs), batch_first=True)
    return stacked * (torch.rand(stacked.shape) < 0.9), torch.tensor(targets)


def sums() -> nn.Module:
    torch.manual_seed(0)
    return Sums()


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.sum(1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_padding_collate_trains_through_growth_and_resumes_exactly(
    tmp_path: Path, num_workers: int
) -> None:
    """Stopped in the middle of an epoch: weights end bit for bit as in one run, random collate
    included."""

    def run(folder: Path | None, stop: int | None = None) -> Any:
        net, box = sums(), []

        def watch(inputs: Any, targets: Tensor, progress: hf.Progress) -> Any:
            if stop is not None and progress.examples >= stop:
                box[0].request_stop()
            return inputs, targets

        data = hf.data.AdaptiveBatches(SEQUENCES, 16, collate_fn=padded, num_workers=num_workers)  # type: ignore[arg-type]
        box.append(
            hf.AdaptiveBatchTrainer(
                net,
                data,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                loss_fn=cross_entropy,
                controller=hf.control.AdaBatch(16, 64, every_epochs=1),
                transform=watch,
                epochs=3,
                run_dir=folder,
                reporting=Reporting(show_progress=False),
            )
        )
        return box[0]

    whole = run(None)
    history = whole.fit()
    assert [row["batch_size"] for row in history.epochs] == [16, 32, 64]
    run(tmp_path / "run", stop=170).fit()
    resumed = run(None)
    resumed.resume(tmp_path / "run")
    assert torch.equal(whole.model.linear.weight, resumed.model.linear.weight)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [(torch.rand(4, 4), torch.zeros(4).long(), 1.0)],
            r"must be a pair \(inputs, targets\), got a tuple of 3",
        ),
        (
            [{"x": torch.rand(4, 4), "y": torch.zeros(4).long()}],
            r"must be a pair \(inputs, targets\), got a dict of 2",
        ),
        (
            torch.utils.data.TensorDataset(torch.rand(4, 4), torch.zeros(4).long()),
            "got a TensorDataset: batch a data",
        ),
        ((torch.rand(4, 4), torch.zeros(4).long(), 1.0), "got a tuple of 3"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(data: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for measure in (
        lambda: hf.training.evaluate(model, data, cross_entropy),
        lambda: hf.normalisation.recalibrate(model, data),
    ):
        with pytest.raises(HessianFlowError, match=message):
            measure()
