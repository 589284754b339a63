"""Lightning with a growing batch, from batches of changing size and by accumulation."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessianflow as hf
from hessianflow.interfaces import HessianFlowError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

library("lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from hessianflow.integrations.lightning import AdaptiveBatch, batches


def data(count: int = 200) -> TensorDataset:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


class Module(LightningModule):
    """A network with dropout, so that the random generators matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.sizes: list[int] = []
        self.validations = 0

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += batch_idx == 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def callback(**options: Any) -> AdaptiveBatch:
    chosen = {"controller": hf.control.AdaBatch(16, 64, every_epochs=1), "every": 120, **options}
    return AdaptiveBatch(nn.CrossEntropyLoss(), **chosen)


def fitted(
    folder: Path, train: Any, callbacks: list[Any], resume: str | None = None, **options: Any
) -> tuple[Module, Trainer]:
    module = Module()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=callbacks,
        logger=CSVLogger(str(folder)),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, train, DataLoader(data(16), 8), ckpt_path=resume)
    return module, trainer


GROWING = [16] * 8 + [32, 20, 20, 32, 32, 64, 36, 36] + [64, 64, 36, 36] * 2
"""The first decision is after 128 examples, the second after 264."""


def test_the_batch_grows_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    module, trainer = fitted(tmp_path, batches(data(), 16), [callback()])
    assert module.sizes == GROWING
    assert trainer.global_step == len(GROWING)
    assert trainer.current_epoch == module.validations == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    [rows] = tmp_path.rglob("metrics.csv")
    head, *lines = rows.read_text().splitlines()
    assert {"batch/size", "curvature/edge_share", "loss"} <= set(head.split(","))
    at = head.split(",").index("batch/size")
    assert [line.split(",")[at] for line in lines if line.split(",")[at]][:2] == ["32.0", "64.0"]


def test_batches_of_a_datamodule_and_with_workers_are_the_same(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(data(), 16, num_workers=1, persistent_workers=True)

        def val_dataloader(self) -> Any:  # which draws from torch's generator
            return DataLoader(data(16), 8)

    expected, _ = fitted(tmp_path / "a", batches(data(), 16), [callback()])
    module = Module()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[callback()],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data())
    assert module.sizes == GROWING
    for one, other in zip(expected.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("save_at", [3, 7, 11, 14])
def test_a_resumed_run_is_equal_bit_for_bit(save_at: int, tmp_path: Path) -> None:
    """The run is saved before, between and after the growths of the batch."""

    def run(resume: str | None = None) -> tuple[Module, Trainer]:
        saving = ModelCheckpoint(
            str(tmp_path), filename="{step}", every_n_train_steps=save_at, save_top_k=-1
        )
        controller = hf.control.ABSA(16, 64, patience=1)
        steered = callback(controller=controller, every=60, budget=None)
        options: dict[str, Any] = {"enable_checkpointing": True}
        return fitted(tmp_path, batches(data(), 16), [steered, saving], resume, **options)

    whole, one = run()
    resumed, other = run(str(tmp_path / f"step={save_at}.ckpt"))
    assert resumed.sizes == whole.sizes[save_at:]
    assert {16, 32, 64} < set(whole.sizes)
    assert one.global_step == other.global_step
    complete = (sum(whole.sizes[:save_at]) - 1) // 200
    assert resumed.validations == 4 - complete
    for mine, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("after_training", [True, False])
def test_a_run_that_is_resumed_between_two_passes_is_equal(
    after_training: bool, tmp_path: Path
) -> None:
    def run(resume: str | None = None) -> Module:
        saving = ModelCheckpoint(
            str(tmp_path), filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=after_training
        )
        options: dict[str, Any] = {"enable_checkpointing": True}
        return fitted(tmp_path, batches(data(), 16), [callback(), saving], resume, **options)[0]

    whole = run()
    resumed = run(str(tmp_path / "epoch=1.ckpt"))
    assert whole.sizes == GROWING
    assert resumed.sizes == GROWING[16:]
    for mine, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_with_a_loader_the_batch_grows_by_accumulation(tmp_path: Path) -> None:
    loader = DataLoader(data(), 16, shuffle=True)
    module, trainer = fitted(tmp_path, loader, [callback()])
    assert len(module.sizes) == 4 * 13
    # 8 updates of 16, then of 32 to the end of the first pass: 3, the last one of a part.
    assert trainer.accumulate_grad_batches == 4
    assert trainer.global_step < 4 * 13 / 2


def test_measuring_alone_changes_nothing(tmp_path: Path) -> None:
    loader = batches(data(), 16)
    plain, _ = fitted(tmp_path / "a", loader, [])
    measuring = AdaptiveBatch(nn.CrossEntropyLoss(), every=50, budget=None)
    module, _ = fitted(tmp_path / "b", batches(data(), 16), [measuring])
    assert module.sizes == plain.sizes
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([callback(every=60)], "AdaptiveBatch and AdaptiveBatch"),
        (
            [GradientAccumulationScheduler({0: 2})],
            "AdaptiveBatch and GradientAccumulationScheduler",
        ),
    ],
    ids=["another", "a schedule"],
)
def test_a_second_part_that_sets_the_batch_size_is_refused(
    others: list[Any], names: str, tmp_path: Path
) -> None:
    with pytest.raises(HessianFlowError, match=f"{names} both set the batch size of this Trainer"):
        fitted(tmp_path, batches(data(), 16), [callback(), *others])


def test_a_loader_whose_batches_do_not_fit_the_first_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(data(), 48)
    with pytest.raises(HessianFlowError, match="first batch size 16 is no multiple of the 48"):
        fitted(tmp_path, loader, [callback()])


def test_accumulation_by_the_user_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HessianFlowError, match="accumulate_grad_batches=2 and the controller both"):
        fitted(tmp_path, batches(data(), 16), [callback()], accumulate_grad_batches=2)
