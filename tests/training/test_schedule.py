"""Schedulers of torch, timm and transformers: the right number of steps, or a word about it."""

import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import SAM
from hessianflow.training import Reporting, Schedule
from hessianflow.training.extent import Extent
from hessianflow.training.schedule import length, misfit, steps_of_run

N, BATCH, EPOCHS = 100, 16, 6
DATA = TensorDataset(
    torch.randn(N, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (N,), generator=torch.Generator().manual_seed(1)),
)
PER_EPOCH = math.ceil(N / BATCH)  # 7 batches, 6.25 reference batches


def sgd() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def trainer(make: Any, unit: Any = "epoch", **options: Any) -> tuple[AdaptiveBatchTrainer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = make(optimizer)
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": EPOCHS,
        "reporting": Reporting(show_progress=False),
    }
    data = AdaptiveBatches(DATA, BATCH)
    made = AdaptiveBatchTrainer(
        model, data, optimizer=optimizer, schedule=Schedule(scheduler, unit), **(settings | options)
    )
    return made, scheduler


def notices(made: AdaptiveBatchTrainer) -> list[str]:
    return [row["message"] for row in made.fit().of_kind("event") if row["event"] == "notice"]


def transformers_cosine(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    return max(0.0, 1 - (step - num_warmup_steps) / num_training_steps)


PER_STEP = {
    "one-cycle": lambda o, n: schedulers.OneCycleLR(o, 1.0, total_steps=n),
    "one-cycle by epochs": lambda o, n: schedulers.OneCycleLR(
        o, 1.0, epochs=EPOCHS, steps_per_epoch=n // EPOCHS
    ),
    "cosine": lambda o, n: schedulers.CosineAnnealingLR(o, n),
    "polynomial": lambda o, n: schedulers.PolynomialLR(o, n),
    "transformers": lambda o, n: schedulers.LambdaLR(
        o, partial(transformers_cosine, num_warmup_steps=0, num_training_steps=n)
    ),
    "sequential": lambda o, n: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.CosineAnnealingLR(o, n - 5)],
        milestones=[5],
    ),
    "chained": lambda o, n: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.CosineAnnealingLR(o, n)]
    ),
}


@pytest.mark.parametrize("name", PER_STEP)
@pytest.mark.parametrize("steps", [EPOCHS * PER_EPOCH, EPOCHS * (N // BATCH)])
def test_a_schedule_built_per_step_and_stepped_per_epoch_is_refused(name: str, steps: int):
    message = f"is built for {steps} steps, one per batch, but would take 6, one per epoch"
    with pytest.raises(HessianFlowError, match=message):
        trainer(lambda optimizer: PER_STEP[name](optimizer, steps))


@pytest.mark.parametrize("name", [name for name in PER_STEP if name != "one-cycle by epochs"])
def test_the_number_that_is_named_fits(name: str):
    """37 of 37.5 reference batches; the last rate is that of the same scheduler stepped as often by
    hand."""
    steps = steps_of_run("reference_batch", Extent(N, passes=EPOCHS), BATCH)
    assert steps is not None
    assert steps == 37
    made, scheduler = trainer(lambda o: PER_STEP[name](o, steps), unit="reference_batch")
    assert notices(made) == []
    optimizer = sgd()
    alone = PER_STEP[name](optimizer, steps)
    for _ in range(steps):
        optimizer.step()
        alone.step()
    assert scheduler.get_last_lr() == pytest.approx(alone.get_last_lr())


def test_an_end_that_is_not_reached_is_said_and_logged_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "hessianflow"):
        made, _ = trainer(
            lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=42),
            unit="reference_batch",
        )
        (message,) = notices(made)
    assert (
        message
        == "OneCycleLR is built for 42 steps and this run takes 37, one per reference batch of"
        " examples: its end is not reached; 37 would fit"
    )
    assert [record.message for record in caplog.records] == [message]


def test_half_a_cosine_by_epochs_is_said():
    made, _ = trainer(lambda o: schedulers.CosineAnnealingLR(o, 2 * EPOCHS))
    assert "built for 12 steps and this run takes 6, one per epoch" in notices(made)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.CosineAnnealingLR(o, EPOCHS),
        lambda o: schedulers.CosineAnnealingLR(o, 2),  # up and down again
        lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=EPOCHS),
        lambda o: schedulers.StepLR(o, 2),
        lambda o: schedulers.MultiStepLR(o, [2, 4]),
        lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: schedulers.LinearLR(o, 0.1, total_iters=3),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
        lambda o: schedulers.ReduceLROnPlateau(o),
    ],
)
def test_schedules_that_fit_are_passed_in_silence(make: Any):
    assert notices(trainer(make)[0]) == []


def test_a_cycle_that_would_end_in_an_error_is_refused():
    """torch raises in the middle of the run: Tried to step 6 times."""
    with pytest.raises(
        HessianFlowError,
        match=r"built for 5 steps, and this run takes 6, .*: build it with total_steps=6",
    ):
        trainer(lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=5))


def test_lengths():
    """Read off by hand; a warm-up of 3 and a cosine of 5 more are 8."""
    o = sgd()
    parts = [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 5)]
    assert length(schedulers.SequentialLR(o, parts, milestones=[3])) == 8
    assert length(schedulers.ChainedScheduler(parts)) == 5
    assert length(schedulers.ExponentialLR(o, 0.9)) is None
    assert length(object()) is None
    assert misfit(schedulers.ExponentialLR(o, 0.9), "epoch", Extent(100, passes=3), 10) == ""


class TimmLike:
    """As timm's: told how many epochs or updates are over, and silent for the other unit."""

    def __init__(self, optimizer: SGD, t_initial: int, t_in_epochs: bool = True) -> None:
        self.optimizer, self.t_initial, self.t_in_epochs = optimizer, t_initial, t_in_epochs
        self.base = optimizer.param_groups[0]["lr"]
        self._set(0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        if self.t_in_epochs:
            self._set(epoch)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        if not self.t_in_epochs:
            self._set(num_updates)

    def _set(self, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 * self.base * (1 + math.cos(math.pi * min(t / self.t_initial, 1)))

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def test_timm_is_told_the_epochs_that_are_over():
    """At 0, 1, 2, ... of 6: the cosine by hand."""
    made, _ = trainer(lambda o: TimmLike(o, EPOCHS))
    expected = [0.05 * (1 + math.cos(math.pi * epoch / EPOCHS)) for epoch in range(EPOCHS)]
    assert [row["lr"] for row in made.fit().epochs] == pytest.approx(expected)


def test_timm_in_updates_is_told_the_reference_batches_that_are_over():
    made, scheduler = trainer(lambda o: TimmLike(o, 37, t_in_epochs=False), unit="reference_batch")
    made.fit()
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_timm_is_resumed_at_its_epoch(tmp_path):
    def stopping(inputs, targets, progress):
        if progress.epoch == 2:
            first.request_stop()
        return inputs, targets

    first, _ = trainer(lambda o: TimmLike(o, EPOCHS), transform=stopping, run_dir=tmp_path / "run")
    first.fit()
    history = trainer(lambda o: TimmLike(o, EPOCHS))[0].resume(tmp_path / "run")
    expected = [0.05 * (1 + math.cos(math.pi * epoch / EPOCHS)) for epoch in range(EPOCHS)]
    assert [row["lr"] for row in history.epochs] == pytest.approx(expected)


@pytest.mark.parametrize(("in_epochs", "unit"), [(True, "reference_batch"), (False, "epoch")])
def test_timm_of_the_other_unit_is_refused(in_epochs: bool, unit: Any):
    wanted = "epoch" if in_epochs else "reference_batch"
    with pytest.raises(
        HessianFlowError,
        match=f'made with t_in_epochs={in_epochs}: use it with unit="{wanted}"',
    ):
        trainer(lambda o: TimmLike(o, 6, in_epochs), unit=unit)


def test_schedulers_that_cannot_be_stepped_are_refused():
    class Wants(TimmLike):
        def step(self, metric):  # type: ignore[override]
            pass

    class Plateau(TimmLike):
        def __init__(self, optimizer):
            super().__init__(optimizer, 6)
            self.lr_scheduler = schedulers.ReduceLROnPlateau(optimizer)

    class Unsaved:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            pass

    with pytest.raises(
        HessianFlowError,
        match=r"Wants.step needs metric, which the trainer cannot pass once per epoch",
    ):
        trainer(lambda o: Wants(o, 6))
    with pytest.raises(
        HessianFlowError, match="Plateau needs a figure at each step: use torch's ReduceLROnPl"
    ):
        trainer(Plateau)
    with pytest.raises(
        HessianFlowError,
        match=r"must be a learning-rate scheduler with state_dict\(\), got a Unsaved",
    ):
        trainer(Unsaved)
    with pytest.raises(
        HessianFlowError, match=r"a learning-rate scheduler with step\(\), got a str"
    ):
        trainer(lambda o: "cosine")
    with pytest.raises(HessianFlowError, match="ReduceLROnPlateau watches epochs"):
        trainer(schedulers.ReduceLROnPlateau, unit="reference_batch")


def test_a_scheduler_of_other_parts_is_refused(tmp_path):
    """Both are SequentialLR; loading the one's state into the other would mix them."""

    def sequential(last: Any) -> Any:
        return lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, total_iters=2), last(o)], milestones=[2]
        )

    trainer(sequential(lambda o: schedulers.CosineAnnealingLR(o, 4)), run_dir=tmp_path / "run")[
        0
    ].fit()
    other, _ = trainer(sequential(lambda o: schedulers.ExponentialLR(o, 0.5)), epochs=8)
    message = (
        r"had the scheduler SequentialLR\(LinearLR, CosineAnnealingLR\), this run has"
        r" SequentialLR\(LinearLR, Exp"
    )
    with pytest.raises(HessianFlowError, match=message):
        other.resume(tmp_path / "run")


def test_a_scheduler_may_be_of_what_a_wrapper_wraps():
    model = nn.Linear(4, 3)
    base = SGD(model.parameters(), lr=0.1)
    run = AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(DATA, BATCH),
        optimizer=SAM(base),
        schedule=Schedule(schedulers.ExponentialLR(base, 0.5)),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=3,
        reporting=Reporting(show_progress=False),
    )
    assert [row["lr"] for row in run.fit().epochs] == [0.1, 0.05, 0.025]
