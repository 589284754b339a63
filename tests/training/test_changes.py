"""What may change while a run goes on: frozen and unfrozen layers, groups that are added; against
loops by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.control import DiveBatch
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import CLARS, ExtraBatchNorms, GradientMoments, MicrobatchNorms
from hessianflow.training import Passes, Reporting, Schedule

F64 = torch.float64
SOURCE = torch.Generator().manual_seed(1)
INPUTS = torch.randn(64, 4, generator=SOURCE, dtype=F64)
TARGETS = torch.randint(3, (64,), generator=SOURCE)
Change = Callable[[nn.Sequential, torch.optim.Optimizer], Any]


def batches() -> AdaptiveBatches:
    return AdaptiveBatches(TensorDataset(INPUTS, TARGETS), 16)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def everything(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def head_only(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)


def freeze(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def add_group(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})


def frozen() -> nn.Sequential:
    model = network()
    model[0].requires_grad_(False)
    return model


CASES: dict[
    str,
    tuple[Callable[[], nn.Sequential], Callable[[nn.Sequential], torch.optim.Optimizer], Change],
] = {
    "freeze": (network, everything, freeze),
    "unfreeze": (frozen, everything, unfreeze),
    "add a group": (network, head_only, add_group),
    "add a frozen group": (frozen, head_only, lambda m, o: (unfreeze(m, o), add_group(m, o))),
}


def trained(case: str, **options: Any) -> tuple[nn.Sequential, Any]:
    make, optimize, change = CASES[case]
    model = make()
    optimizer = optimize(model)

    def transform(inputs, targets, progress):
        if progress.updates == 4:
            change(model, optimizer)
        return inputs, targets

    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 2,
        "reporting": Reporting(show_progress=False),
    }
    history = AdaptiveBatchTrainer(
        model, batches(), optimizer=optimizer, transform=transform, **(settings | options)
    ).fit()
    return model, history


def by_hand(case: str, limit: float | None = None) -> nn.Sequential:
    make, optimize, change = CASES[case]
    model = make()
    optimizer, stream = optimize(model), batches()
    for step, (inputs, targets) in enumerate(pair for _ in range(2) for pair in stream):
        if step == 4:
            change(model, optimizer)
        model.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        if limit is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], limit)
        optimizer.step()
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_trains_as_by_hand(case: str, microbatch_size: int | None):
    ours, history = trained(case, passes=Passes(microbatch_size=microbatch_size))
    assert_same(ours, by_hand(case))
    events = [row["message"] for row in history.of_kind("event") if row["event"] == "parameters"]
    if case != "add a group":  # the layer was trainable before, only nobody moved it
        assert len(events) == 1
        assert "0.weight, 0.bias" in events[0]


@pytest.mark.parametrize("case", CASES)
def test_trains_as_by_hand_with_clipping(case: str):
    assert_same(trained(case, passes=Passes(max_grad_norm=0.3))[0], by_hand(case, 0.3))


@pytest.mark.parametrize("case", CASES)
def test_trains_as_by_hand_with_observers(case: str):
    """One that sums gradients by parameter among them."""
    watching = GradientMoments(accumulate=True)
    ours, _ = trained(case, observers=[watching], passes=Passes(microbatch_size=4))
    assert_same(ours, by_hand(case))
    assert watching.state_dict()["large_count"] == 8


@pytest.mark.parametrize("case", ["freeze", "unfreeze"])
def test_sums_of_gradients_go_on_for_the_parameters_that_stay(case: str):
    """Of one epoch that the change falls into; the oracle adds up gradients of a loop by hand, by
    name."""
    make, optimize, change = CASES[case]
    theirs = make()
    optimizer = optimize(theirs)
    total = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for step, (inputs, targets) in enumerate(batches()):
        if step == 2:
            change(theirs, optimizer)
        theirs.zero_grad()
        cross_entropy(theirs(inputs), targets).backward()
        for name, p in theirs.named_parameters():
            if p.grad is not None:
                total[name] += len(targets) * p.grad
        optimizer.step()
    model = make()
    optimizer, watching = optimize(model), GradientMoments(accumulate=True)

    def transform(inputs, targets, progress):
        if progress.updates == 2:
            change(model, optimizer)
        return inputs, targets

    AdaptiveBatchTrainer(
        model,
        batches(),
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        epochs=1,
        transform=transform,
        observers=[watching],
        reporting=Reporting(show_progress=False),
    ).fit()
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = sum(float(value.square().sum()) for name, value in total.items() if name in kept)
    assert watching.signals()["gradient_sum_sq"] == pytest.approx(expected, rel=1e-12)


def test_a_controller_that_measures_goes_on_over_a_change():
    _, history = trained(
        "unfreeze", observers=[GradientMoments(accumulate=True)], controller=DiveBatch(16, 64)
    )
    assert len(history.of_kind("signals")) == 1


def by_clars(kind: type) -> nn.Sequential:
    model, seen = frozen(), []
    norms: Any = MicrobatchNorms()
    if kind is ExtraBatchNorms:
        norms = ExtraBatchNorms(model, nn.CrossEntropyLoss(), lambda: [seen[-1]])
    optimizer = CLARS(model.parameters(), 0.5, max_rate=None, norms=norms)

    def transform(inputs, targets, progress):
        if progress.updates == 4:
            unfreeze(model, optimizer)
        seen.append((inputs, targets))
        return inputs, targets

    options: dict[str, Any] = {
        "optimizer": optimizer,
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 2,
    }
    AdaptiveBatchTrainer(
        model,
        batches(),
        transform=transform,
        observers=[norms],
        reporting=Reporting(show_progress=False),
        **options,
    ).fit()
    return model


def test_clars_goes_on_with_a_layer_unfrozen():
    """With one microbatch a step both estimators give the norm of the whole gradient, so that the
    two runs agree."""
    ours, theirs = by_clars(MicrobatchNorms), by_clars(ExtraBatchNorms)
    assert not torch.equal(ours[0].weight, network()[0].weight)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


class Deaf:
    """An observer that nobody can tell whose gradients it is shown."""

    def on_microbatch(self, gradients, examples):
        pass

    on_step = on_microbatch

    def signals(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_an_observer_that_cannot_be_told_is_named():
    message = (
        "no longer trained: 0.weight, 0.bias: the observer Deaf cannot be told whose gradients it"
        " is shown"
    )
    with pytest.raises(HessianFlowError, match=message):
        trained("freeze", observers=[Deaf()])


def test_unfrozen_without_a_group_is_said():
    def change(model, optimizer):
        model[0].requires_grad_(True)

    CASES["stranger"] = (frozen, head_only, change)
    try:
        model, history = trained("stranger")
    finally:
        del CASES["stranger"]
    (row,) = [row for row in history.of_kind("event") if row["event"] == "parameters"]
    assert (
        row["message"]
        == "trained from now on: 0.weight, 0.bias; in no group of the optimizer, which does not"
        " move it: 0.weight, 0.bias"
    )
    assert torch.equal(model[0].weight, network()[0].weight)


def test_a_scheduler_that_cannot_follow_an_added_group_is_named():
    model = network()
    optimizer = head_only(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def transform(inputs, targets, progress):
        if progress.updates == 2:
            add_group(model, optimizer)
        return inputs, targets

    run = AdaptiveBatchTrainer(
        model,
        batches(),
        optimizer=optimizer,
        schedule=Schedule(scheduler),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=2,
        transform=transform,
        reporting=Reporting(show_progress=False),
    )
    with pytest.raises(
        HessianFlowError, match=r"LambdaLR could not take its step 1: .* has 2 parameter groups now"
    ):
        run.fit()
