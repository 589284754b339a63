"""A loop on accelerate with a growing batch."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import library
from torch import nn
from torch.utils.data import TensorDataset

import hessianflow as hf
from hessianflow.interfaces import HessianFlowError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

library("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from accelerate import Accelerator

    from hessianflow.integrations.accelerate import AdaptiveBatch


def stream() -> hf.data.AdaptiveBatches:
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    return hf.data.AdaptiveBatches(TensorDataset(inputs, (inputs.sum(1) > 0).long()), 16)


class Loop:
    """A training loop as users write it; dropout makes the random generators matter."""

    def __init__(self, accelerator: Any, controller: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loss_fn = nn.CrossEntropyLoss()
        parts = (accelerator, self.model, self.optimizer, stream(), self.loss_fn)
        self.steering = AdaptiveBatch(*parts, controller=controller, **options)
        self.sizes: list[int] = []
        self.figures: list[dict[str, float]] = []

    def run(self, passes: int, save: tuple[int, Path] | None = None) -> None:
        for _ in range(self.steering.batches.epoch, passes):
            for inputs, targets in self.steering.batches:
                loss = self.loss_fn(self.model(inputs), targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.sizes.append(len(inputs))
                self.figures.append(self.steering.after_step(loss))
                if save is not None and len(self.sizes) == save[0]:
                    self.accelerator.save_state(str(save[1]))

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def test_the_batch_grows_in_the_middle_of_a_pass() -> None:
    loop = Loop(Accelerator(), hf.control.AdaBatch(16, 64, every_epochs=1), every=120)
    loop.run(2)
    assert loop.sizes == [16] * 8 + [32, 20, 20, 32, 32, 64, 36, 36]
    assert loop.figures[7]["batch/size"] == 32
    assert loop.figures[7]["curvature/edge_share"] > 0
    assert loop.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("save_at", [5, 9, 13, 16])
def test_a_resumed_run_is_equal_bit_for_bit(save_at: int, tmp_path: Path) -> None:
    def loop() -> Loop:
        controller = hf.control.ABSA(16, 64, patience=1)
        return Loop(Accelerator(), controller, every=60, budget=None)

    whole = loop()
    whole.run(3, (save_at, tmp_path / "state"))
    resumed = loop()
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.run(3)
    assert resumed.sizes == whole.sizes[save_at:]
    assert 64 in whole.sizes
    for one, other in zip(whole.weights(), resumed.weights(), strict=True):
        assert torch.equal(one, other)


def test_measuring_alone_changes_nothing() -> None:
    measured = Loop(Accelerator(), None, every=50, budget=None)
    measured.run(2)
    plain = Loop(Accelerator(), None, every=10**6)
    plain.run(2)
    assert sum(bool(figures) for figures in measured.figures) == 8
    for one, other in zip(measured.weights(), plain.weights(), strict=True):
        assert torch.equal(one, other)


def test_figures_reach_the_trackers(tmp_path: Path) -> None:
    library("tensorboard")
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    loop = Loop(accelerator, None, every=100)
    loop.run(1)
    accelerator.end_training()
    assert list(tmp_path.rglob("events.*"))


def test_a_second_part_that_sets_the_batch_size_is_refused() -> None:
    accelerator = Accelerator()
    Loop(accelerator, hf.control.FixedBatch(16))
    with pytest.raises(
        HessianFlowError, match="AdaptiveBatch and AdaptiveBatch both set the batch size"
    ):
        Loop(accelerator, hf.control.FixedBatch(16))
    with pytest.raises(HessianFlowError, match="gradient_accumulation_steps=2 and the controller"):
        Loop(Accelerator(gradient_accumulation_steps=2), hf.control.FixedBatch(16))


def test_signals_that_such_a_loop_does_not_give_are_refused() -> None:
    with pytest.raises(
        HessianFlowError, match=r"NormTest needs .*, which a loop on accelerate does"
    ):
        Loop(Accelerator(), hf.control.NormTest(16, 64))
