"""A checkpoint's optimizer state goes to the weights it was taken from, and not to those in their
place.

The oracle is the uninterrupted run, bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.data import AdaptiveBatches
from hessianflow.training import Reporting, Schedule

DATA = TensorDataset(
    torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(4, (64,), generator=torch.Generator().manual_seed(1)),
)


class Around(torch.optim.Optimizer):
    """Shows the groups of another optimizer, as common wrappers do; `follows`: also after a state
    was loaded."""

    def __init__(self, inner: torch.optim.Optimizer, *, follows: bool) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.follows = inner, follows
        self.param_groups = inner.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        if self.follows:
            self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))


def run(
    model: nn.Module, optimizer: Any, folder: Path | None = None, stop: int = -1, **options: Any
) -> AdaptiveBatchTrainer:
    def watch(inputs: Any, targets: Any, progress: Any) -> Any:
        if progress.updates == stop:
            made.request_stop()
        return inputs, targets

    made = AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(DATA, 16),
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        epochs=3,
        run_dir=folder,
        transform=watch,
        reporting=Reporting(show_progress=False),
        **options,
    )
    return made


def adam(model: nn.Module, order: Sequence[int]) -> torch.optim.Adam:
    parameters = list(model.parameters())
    return torch.optim.Adam([parameters[place] for place in order], lr=0.05)


@pytest.mark.parametrize("width", [4, 5], ids=["equal shapes", "other shapes"])
def test_resumes_with_the_weights_in_another_order(tmp_path, width):
    whole, first, second = net(width), net(width), net(width)
    run(whole, adam(whole, [0, 1, 2, 3])).fit()
    run(first, adam(first, [0, 1, 2, 3]), tmp_path / "run", stop=5).fit()
    run(
        second,
        adam(second, [2, 3, 1, 0]),
    ).resume(tmp_path / "run")
    for expected, found in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_refuses_weights_in_other_groups(tmp_path):
    def groups(model: nn.Module, order: Sequence[int]) -> torch.optim.SGD:
        layers = [model[0], model[2]]
        parts = [{"params": layers[place].parameters(), "lr": 0.1 * (place + 1)} for place in order]
        return torch.optim.SGD(parts, lr=0.1, momentum=0.9)

    first, second = net(), net()
    run(first, groups(first, [0, 1]), tmp_path / "run", stop=5).fit()
    with pytest.raises(
        HessianFlowError, match=r"'0.bias' is in its parameter group 0, and in group 1 of this run"
    ):
        run(second, groups(second, [1, 0])).resume(tmp_path / "run")


def test_refuses_a_wrapper_that_loses_its_groups(tmp_path):
    def around(model: nn.Module, *, follows: bool) -> Around:
        return Around(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), follows=follows)

    whole, first, second, third = net(), net(), net(), net()
    optimizers = [around(model, follows=True) for model in (whole, first, second)]
    schedulers = [StepLR(optimizer, 1, 0.1) for optimizer in optimizers]
    run(whole, optimizers[0], schedule=Schedule(schedulers[0])).fit()
    run(first, optimizers[1], tmp_path / "run", stop=5, schedule=Schedule(schedulers[1])).fit()
    run(second, optimizers[2], schedule=Schedule(schedulers[2])).resume(tmp_path / "run")
    assert torch.equal(whole[0].weight, second[0].weight)
    stale = around(third, follows=False)
    with pytest.raises(HessianFlowError, match=r"Around does not step by its own param_groups"):
        run(third, stale, schedule=Schedule(StepLR(stale, 1, 0.1))).resume(tmp_path / "run")


def test_refuses_a_wrapper_with_copies_of_groups():
    class Copied(Around):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner, follows=False)
            self.param_groups = [dict(group) for group in inner.param_groups]

    model = net()
    with pytest.raises(HessianFlowError, match=r"Copied does not step by its own param_groups"):
        run(model, Copied(torch.optim.SGD(model.parameters(), lr=0.1)))
