"""The best epoch by any recorded figure, and an early end."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import AdaptiveBatches
from hessianflow.runs import checkpoints
from hessianflow.training import AfterEpoch, Best, Reporting

DATA = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))


class Figures:
    """A measurement that returns the next "score" after each epoch."""

    kind = "measured"

    def __init__(self, values: Iterable[float]) -> None:
        self.values = list(values)
        self.next = 0

    def __call__(self) -> tuple[Mapping[str, float], str]:
        self.next += 1
        return {"score": self.values[self.next - 1]}, ""

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]


def trainer(values: Iterable[float], best: Best, **options: Any) -> AdaptiveBatchTrainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings: dict[str, Any] = {"epochs": 6} | options
    return AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(DATA, 8),
        optimizer=SGD(model.parameters(), lr=0.01),
        loss_fn=nn.MSELoss(),
        after_epoch=AfterEpoch(measurements=[Figures(values)], best=best),
        reporting=Reporting(show_progress=False),
        **settings,
    )


@pytest.mark.parametrize(("mode", "epoch"), [("max", 2), ("min", 4)])
def test_the_checkpoint_of_the_best_epoch(tmp_path: Path, mode: Any, epoch: int) -> None:
    made = trainer([3, 5, 4, 1, float("nan"), 2], Best("score", mode), run_dir=tmp_path / "run")
    made.fit()
    state = checkpoints.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert state["counters"]["epoch"] == epoch


@pytest.mark.parametrize(
    ("values", "epochs"),
    [([3, 5, 4, 4, 6, 9], 4), ([1, 2, 3, 4, 5, 6], 6), ([3, 2, 9, 1, 8, 7], 5)],
)
def test_patience(values: list[float], epochs: int) -> None:
    made = trainer(values, Best("score", patience=2))
    history = made.fit()
    assert len(history.epochs) == epochs
    assert history.summary["status"] == "finished"
    ended = [row["message"] for row in history.of_kind("event") if row["event"] == "ended early"]
    expected = []
    if epochs < 6:
        expected = ["no improvement in 2 epochs: the run ends early"]
    assert ended == expected
    with pytest.raises(HessianFlowError, match="this run is over"):
        made.fit()


def test_a_run_that_ended_early_stays_over_after_resuming(tmp_path: Path) -> None:
    values = [5, 4, 3, 2, 1, 0]
    trainer(values, Best("score", patience=3), run_dir=tmp_path / "run", max_updates=7).fit()
    resumed = trainer(values, Best("score", patience=3))
    history = resumed.resume(tmp_path / "run")
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]
    again = trainer(values, Best("score", patience=3)).resume(tmp_path / "run")
    assert again.summary["epochs"] == 4


def test_the_loss_of_the_training_data_may_decide() -> None:
    made = trainer(range(6), Best("train_loss", "min", patience=1))
    assert len(made.fit().epochs) == 6


def test_the_eigenvalue_may_decide() -> None:
    model = nn.Linear(4, 1)
    loss_fn = nn.MSELoss()
    data = AdaptiveBatches(DATA, 8)
    history = AdaptiveBatchTrainer(
        model,
        data,
        optimizer=SGD(model.parameters(), lr=0.01),
        loss_fn=loss_fn,
        epochs=5,
        probe=CurvatureProbe(model, loss_fn, data.sample(32)),
        # The loss is quadratic: its eigenvalue is the same at all weights, up to rounding.
        after_epoch=AfterEpoch(best=Best("eigenvalue", patience=1)),
        reporting=Reporting(show_progress=False),
    ).fit()
    assert 2 <= len(history.epochs) <= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Best(mode="most"), "Best.mode must be one of max, min, got 'most'"),  # type: ignore[arg-type]
        (lambda: Best(patience=0), "Best.patience must be a whole number >= 1"),
        (lambda: AfterEpoch(best="loss"), "AfterEpoch.best must be a hf.training.Best"),  # type: ignore[arg-type]
        (
            lambda: trainer(range(6), Best("eval_loss")).fit(),
            "Best.figure 'eval_loss' is not recorded after an epoch of this run: choose one of",
        ),
    ],
)
def test_invalid_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(HessianFlowError) as caught:
        make()
    assert message in str(caught.value)
