"""Where the weights are evaluated is not always where they are trained: averages, and what is the
best of a run."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer
from hessianflow.curvature import HessianOperator
from hessianflow.data import AdaptiveBatches, DeviceBatches
from hessianflow.runs import checkpoints
from hessianflow.training import AfterEpoch, Checkpoints, Reporting, evaluate

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))
PAIR = (INPUTS, TARGETS)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> AdaptiveBatchTrainer:
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 3,
        "reporting": Reporting(show_progress=False),
    }
    data = AdaptiveBatches(TensorDataset(*PAIR), 16)
    return AdaptiveBatchTrainer(model, data, PAIR, optimizer=optimizer, **(settings | options))


class Averaging(torch.optim.SGD):
    """As the schedule-free optimizers: `eval` puts the mean of all points in the place of the
    weights, `train` takes it back, and a step at the mean is an error."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.5)
        self.training, self.steps = False, 0

    def train(self) -> None:
        self._swap(to_training=True)

    def eval(self) -> None:
        self._swap(to_training=False)

    @torch.no_grad()
    def _swap(self, *, to_training: bool) -> None:
        if self.training == to_training:
            return
        self.training = to_training
        for p in self.param_groups[0]["params"]:
            if "mean" in self.state[p]:
                held = p.clone()
                p.copy_(self.state[p]["mean"])
                self.state[p]["mean"] = held

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.training, "the optimizer was not in train mode when step was called"
        super().step(closure)
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean += (p - mean) / self.steps


def means_by_hand(epochs: int) -> list[float]:
    """Losses at the mean of all points of plain SGD, after each epoch."""
    model, points, losses = linear(), [], []
    optimizer, stream = (
        torch.optim.SGD(model.parameters(), lr=0.5),
        AdaptiveBatches(TensorDataset(*PAIR), 16),
    )
    for _ in range(epochs):
        for inputs, targets in stream:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            points.append([p.detach().clone() for p in model.parameters()])
        mean = [torch.stack(column).mean(0) for column in zip(*points, strict=True)]
        averaged = linear()
        with torch.no_grad():
            for p, value in zip(averaged.parameters(), mean, strict=True):
                p.copy_(value)
        losses.append(evaluate(averaged, PAIR, nn.CrossEntropyLoss()).loss)
    return losses


def test_an_optimizer_with_two_points_is_evaluated_at_its_mean_and_trained_at_its_own():
    model = linear()
    history = trainer(model, Averaging(model.parameters())).fit()
    assert [row["eval_loss"] for row in history.epochs] == pytest.approx(means_by_hand(3), rel=1e-5)


def test_checkpoints_hold_the_training_point_and_the_best_one_the_mean(tmp_path: Path):
    model = linear()
    history = trainer(model, Averaging(model.parameters()), run_dir=tmp_path / "run").fit()
    last, best = (
        checkpoints.load(tmp_path / "run" / "checkpoints" / name) for name in ("last.pt", "best.pt")
    )
    assert torch.equal(last["model"]["weight"], model.weight)
    averaged = linear()
    averaged.load_state_dict(best["model"])
    accuracies = [row["eval_accuracy"] for row in history.epochs]
    found = evaluate(averaged, PAIR, nn.CrossEntropyLoss())
    assert found.accuracy == max(accuracies)
    assert found.loss == pytest.approx(
        history.epochs[accuracies.index(max(accuracies))]["eval_loss"], rel=1e-6
    )


def test_such_a_run_is_resumed(tmp_path: Path):
    """In train mode, whatever the mode the optimizer was built in."""
    first, second, whole = linear(), linear(), linear()

    def stop(inputs, targets, progress):
        if progress.updates == 5:
            made.request_stop()
        return inputs, targets

    made = trainer(first, Averaging(first.parameters()), transform=stop, run_dir=tmp_path / "run")
    made.fit()
    optimizer = Averaging(second.parameters())
    optimizer.steps = 6  # it keeps this outside its state, unlike those of the packages
    trainer(second, optimizer).resume(tmp_path / "run")
    trainer(whole, Averaging(whole.parameters())).fit()
    assert torch.equal(second.weight, whole.weight)


class Swap:
    """An exponential average in the place of the weights, for the length of an evaluation."""

    def __init__(self, model: nn.Module, average: AveragedModel) -> None:
        self.model, self.average = model, average
        self.calls: list[str] = []

    def into(self) -> None:
        self.calls.append("before")
        self.held = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())

    def back(self) -> None:
        self.calls.append("after")
        self.model.load_state_dict(self.held)


def test_an_average_is_evaluated_and_put_back(tmp_path: Path):
    model, plain = linear(), linear()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    swap = Swap(model, average)
    history = trainer(
        model,
        optimizer,
        after_epoch=AfterEpoch(before_evaluation=swap.into, after_evaluation=swap.back),
        checkpoints=Checkpoints(state={"average": average}),
        run_dir=tmp_path / "run",
    ).fit()
    trainer(plain, torch.optim.SGD(plain.parameters(), lr=0.5)).fit()
    assert torch.equal(model.weight, plain.weight)
    found = evaluate(average.module, PAIR, nn.CrossEntropyLoss()).loss
    assert history.epochs[-1]["eval_loss"] == pytest.approx(found, rel=1e-6)
    assert swap.calls == ["before", "after"] * 3
    assert torch.equal(
        checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["model"]["weight"],
        model.weight,
    )


def test_weights_are_put_back_after_an_evaluation_that_failed():
    model = linear()
    average = AveragedModel(model)
    swap, optimizer = Swap(model, average), Averaging(model.parameters())

    def fail(outputs, targets):
        if not torch.is_grad_enabled():
            raise OSError("the evaluation data are gone")
        return nn.functional.cross_entropy(outputs, targets)

    made = trainer(
        model,
        optimizer,
        loss_fn=fail,
        after_epoch=AfterEpoch(before_evaluation=swap.into, after_evaluation=swap.back),
    )
    with pytest.raises(OSError, match="the evaluation data are gone"):
        made.fit()
    assert swap.calls == ["before", "after"]
    assert optimizer.training
    assert not torch.equal(model.weight, average.module.weight)


def test_the_best_of_a_regression_is_that_of_the_lowest_loss(tmp_path: Path):
    """The rate is raised in the last epoch, so that it gets worse."""
    torch.manual_seed(0)
    model, targets = nn.Linear(4, 1), INPUTS.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def worsen(inputs, targets, progress):
        optimizer.param_groups[0]["lr"] = 0.05 if progress.epoch < 3 else 1.2
        return inputs, targets

    history = AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(TensorDataset(INPUTS, targets), 16),
        (INPUTS, targets),
        optimizer=optimizer,
        loss_fn=nn.MSELoss(),
        epochs=4,
        transform=worsen,
        run_dir=tmp_path / "run",
        reporting=Reporting(show_progress=False),
    ).fit()
    losses = [row["eval_loss"] for row in history.epochs]
    assert losses.index(min(losses)) == 2
    best = nn.Linear(4, 1)
    best.load_state_dict(checkpoints.load(tmp_path / "run" / "checkpoints" / "best.pt")["model"])
    assert evaluate(best, (INPUTS, targets), nn.MSELoss()).loss == pytest.approx(
        min(losses), rel=1e-6
    )


def test_a_loss_that_is_not_finite_is_never_the_best():
    from hessianflow.training.course import Counters

    counters = Counters()
    assert [
        counters.is_best(None, loss) for loss in (float("nan"), 2.0, float("nan"), 3.0, 1.0)
    ] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert [counters.is_best(accuracy, 0.0) for accuracy in (0.5, 0.5, 0.6)] == [True, False, True]


@pytest.mark.parametrize("read", [1, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["device", "adaptive"])
def test_data_that_somebody_has_read_from_are_evaluated_from_the_first_example(
    kind: str, shuffle: bool, read: int
):
    """A look at a batch, or an evaluation that was interrupted; 5 of 5 batches leave nothing.
    Oracle: one pass."""
    source = torch.Generator().manual_seed(4)
    inputs, targets = (
        torch.randn(40, 3, generator=source),
        torch.randint(3, (40,), generator=source),
    )
    model, loss_fn = nn.Linear(3, 3), nn.CrossEntropyLoss()
    expected = float(loss_fn(model(inputs), targets).detach())
    if kind == "device":
        data: Any = DeviceBatches(inputs, targets, 8, shuffle=shuffle)
    else:
        data = AdaptiveBatches(TensorDataset(inputs, targets), 8, shuffle=shuffle)
    for _ in itertools.islice(data, read):
        pass
    for _ in range(2):
        found = evaluate(model, data, loss_fn)
        assert found.examples == 40
        assert found.loss == pytest.approx(expected, rel=1e-6)
    next(iter(data))
    product = HessianOperator(model, loss_fn, data) @ torch.ones(12)
    torch.testing.assert_close(
        product, HessianOperator(model, loss_fn, (inputs, targets)) @ torch.ones(12)
    )
