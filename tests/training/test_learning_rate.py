"""Oracle: the same scheduler run alone; the factor must multiply what it gives, step by step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.control import AdaBatch
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import SAM
from hessianflow.training import Reporting, Schedule
from hessianflow.training.learning_rate import LearningRate

MAKERS = {
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 4], gamma=0.2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=8, power=2),
    "one-cycle": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.5, total_steps=20, cycle_momentum=False
    ),
    "sequential": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 5)],
        milestones=[3],
    ),
}
FACTORS = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 0.5]


def optimizer() -> SGD:
    return SGD(
        [
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1},
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0},
        ]
    )


def rates(made: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in made.param_groups]


@pytest.mark.parametrize("name", MAKERS)
def test_factor_multiplies_any_schedule(name: str):
    """Within a step; between steps the groups hold what the scheduler set, bit for bit."""
    alone, with_factor = optimizer(), optimizer()
    reference, rate = MAKERS[name](alone), LearningRate(with_factor, MAKERS[name](with_factor))
    for factor in FACTORS:
        with rate.in_force(factor):
            assert rates(with_factor) == [plain * factor for plain in rates(alone)]
            with_factor.step()
        assert rates(with_factor) == rates(alone)
        assert rate.value == rates(alone)[0] * factor
        alone.step()
        reference.step()
        rate.step()


def test_plateau_is_fed_the_metric():
    opt = optimizer()
    rate = LearningRate(opt, schedulers.ReduceLROnPlateau(opt, factor=0.1, patience=0))
    rate.factor = 4.0
    rate.step(1.0)
    assert rate.value == pytest.approx(0.4)
    rate.step(2.0)  # worse than 1.0: the scheduled rate falls tenfold, the factor stays
    assert rate.value == pytest.approx(0.04)


def test_factor_is_absolute_and_applies_without_a_scheduler():
    opt = optimizer()
    rate = LearningRate(opt)
    for _ in range(2):
        with rate.in_force(2.0):
            assert rates(opt) == [0.2, 2.0]
        rate.step()
    assert rates(opt) == [0.1, 1.0]


@pytest.mark.parametrize("name", MAKERS)
def test_saved_and_loaded_continues(name: str):
    first = optimizer()
    rate = LearningRate(first, MAKERS[name](first))
    for _ in range(3):
        first.step()
        rate.step()
    rate.factor = 3.0
    second = optimizer()
    again = LearningRate(second, MAKERS[name](second))
    second.load_state_dict(first.state_dict())
    again.load_state_dict(rate.state_dict())
    for _ in range(4):
        for pair in (first, second):
            pair.step()
        rate.step()
        again.step()
        assert rates(first) == rates(second)
        assert rate.value == again.value


def test_a_state_that_held_the_rates_with_the_factor_continues():
    """Checkpoints of earlier releases: the optimizer's groups held what was trained with."""
    opt = optimizer()
    rate = LearningRate(opt)
    state = rate.state_dict() | {"factor": 3.0}
    opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 0.3, 3.0
    rate.load_state_dict(state)
    assert rates(opt) == [0.1, 1.0]
    assert rate.value == pytest.approx(0.3)


def tensor_rate(value: float) -> Optimizer:
    return torch.optim.Adam(
        [nn.Parameter(torch.zeros(1))], lr=torch.tensor(value), capturable=False, foreach=False
    )


def test_a_rate_kept_in_a_tensor_is_filled_in_place():
    opt = tensor_rate(0.5)
    held, rate = opt.param_groups[0]["lr"], LearningRate(opt)
    with rate.in_force(2.0):
        assert opt.param_groups[0]["lr"] is held
        assert held.item() == 1.0
    assert held.item() == 0.5


@pytest.mark.parametrize("how", ["filled", "replaced"])
def test_a_tensor_set_by_hand_is_seen(how: str):
    opt = tensor_rate(0.5)
    rate = LearningRate(opt)
    for value in (0.25, 0.125, 0.125):
        if how == "filled":
            opt.param_groups[0]["lr"].fill_(value)
        else:
            opt.param_groups[0]["lr"] = torch.tensor(value)
        with rate.in_force(2.0):
            assert rates(opt) == [2 * value]
        assert rate.value == 2 * value
        assert rates(opt) == [value]


@pytest.mark.parametrize("make", [optimizer, lambda: tensor_rate(0.1)])
def test_a_rate_that_the_optimizer_changes_in_its_step_is_one_with_the_factor(make: Any):
    """Halved at every step, as a hypergradient would: twice as fast under a factor of 2, and no
    runaway."""
    opt = make()
    rate = LearningRate(opt)
    for step in range(1, 4):
        with rate.in_force(2.0):
            opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] * 0.5
        assert rate.value == pytest.approx(0.2 * 0.5**step)
        assert rates(opt)[0] == pytest.approx(0.1 * 0.5**step)


@pytest.mark.parametrize("changed", [1.0, 0.5])
def test_groups_that_share_a_tensor_as_their_rate(changed: float):
    """Torch gives every group the tensor that the optimizer is built with; one of the user's own
    stays apart. Each is multiplied once, and put back once, whatever the optimizer does to it."""
    own = {"params": [nn.Parameter(torch.zeros(1))], "lr": torch.tensor(1.0)}
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        own,
        {"params": [nn.Parameter(torch.zeros(1))]},
    ]
    opt = SGD(groups, lr=torch.tensor(0.5))
    assert opt.param_groups[0]["lr"] is opt.param_groups[2]["lr"]
    rate = LearningRate(opt)
    for step in range(1, 4):
        with rate.in_force(4.0):
            assert rates(opt) == [2.0 * changed ** (step - 1), 4.0, 2.0 * changed ** (step - 1)]
            opt.param_groups[0]["lr"].mul_(changed)
        assert rates(opt) == [0.5 * changed**step, 1.0, 0.5 * changed**step]


def test_a_step_that_fails_leaves_the_rates_without_the_factor():
    opt = optimizer()
    rate = LearningRate(opt)
    with pytest.raises(KeyboardInterrupt), rate.in_force(5.0):
        raise KeyboardInterrupt
    assert rates(opt) == [0.1, 1.0]


# In a run

DATA = TensorDataset(
    torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (64,), generator=torch.Generator().manual_seed(1)),
)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def trainer(model: nn.Module, opt: Optimizer, **options: Any) -> AdaptiveBatchTrainer:
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 4,
        "reporting": Reporting(show_progress=False),
    }
    return AdaptiveBatchTrainer(
        model, AdaptiveBatches(DATA, 16), optimizer=opt, **(settings | options)
    )


def test_rates_set_by_hand_are_kept():
    """The loop of the ImageNet example, written by hand: 0.1, halved every epoch."""
    model, hand = linear(), linear()
    opt, alone = (
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        SGD(hand.parameters(), lr=0.1, momentum=0.9),
    )

    def adjust(inputs, targets, progress):
        for group in opt.param_groups:
            group["lr"] = 0.1 * 0.5**progress.epoch
        return inputs, targets

    history = trainer(model, opt, transform=adjust).fit()
    assert [row["lr"] for row in history.epochs] == [0.1, 0.05, 0.025, 0.0125]
    batches = AdaptiveBatches(DATA, 16)
    for epoch in range(4):
        alone.param_groups[0]["lr"] = 0.1 * 0.5**epoch
        for inputs, targets in batches:
            alone.zero_grad()
            nn.functional.cross_entropy(hand(inputs), targets).backward()
            alone.step()
    assert torch.equal(model.weight, hand.weight)


def test_the_rate_set_between_building_and_training_counts():
    model = linear()
    opt = SGD(model.parameters(), lr=0.1)
    made = trainer(model, opt, epochs=1)
    opt.param_groups[0]["lr"] = 0.02
    assert made.fit().epochs[0]["lr"] == 0.02


def test_the_factor_multiplies_what_is_set_by_hand():
    """Batch 16, 32, 64: with the rate in proportion, factors 1, 2, 4 of 0.1, 0.05, 0.025; and the
    record says so."""
    model = linear()
    opt = SGD(model.parameters(), lr=0.1)
    used: list[float] = []
    opt.register_step_pre_hook(lambda made, *_: used.append(made.param_groups[0]["lr"]))

    def adjust(inputs, targets, progress):
        opt.param_groups[0]["lr"] = 0.1 * 0.5**progress.epoch
        return inputs, targets

    controller = AdaBatch(16, 64, every_epochs=1, lr_decay=1)
    history = trainer(model, opt, transform=adjust, controller=controller, epochs=3).fit()
    factors = [row["lr_factor"] for row in history.epochs]
    assert used == pytest.approx(
        [0.1 * factors[0]] * 4 + [0.05 * factors[1]] * 2 + [0.025 * factors[2]]
    )
    assert [row["lr"] for row in history.epochs] == pytest.approx([used[0], used[4], used[6]])


def test_a_scheduler_stepped_by_the_user_is_multiplied_too():
    """Halved after each of 4 steps an epoch by a scheduler that the trainer does not know."""
    model = linear()
    opt = SGD(model.parameters(), lr=0.8)
    own = schedulers.ExponentialLR(opt, 0.5)

    def transform(inputs, targets, progress):
        if progress.updates > 0:
            own.step()
        return inputs, targets

    history = trainer(model, opt, transform=transform, epochs=1).fit()
    assert history.epochs[0]["lr"] == pytest.approx(0.1)


def test_a_factor_other_than_1_on_a_rate_set_by_hand_is_said_once():
    model = linear()
    opt = SGD(model.parameters(), lr=0.1)

    def adjust(inputs, targets, progress):
        opt.param_groups[0]["lr"] = 0.1 / (1 + progress.updates)
        return inputs, targets

    def events(**options: Any) -> list[str]:
        controller = SimpleDoubling()
        found = trainer(model, opt, controller=controller, **options).fit().of_kind("event")
        return [row["message"] for row in found if row["event"] == "rate"]

    assert events() == []
    (message,) = events(transform=adjust)
    assert "set by hand" in message
    assert "times the controller's factor" in message


class SimpleDoubling:
    """Batch 16 to 32 at twice the rate after the first epoch."""

    def __init__(self) -> None:
        self._inner = AdaBatch(16, 32, every_epochs=1, lr_decay=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def decision(self):
        return self._twice(self._inner.decision)

    def update(self, *given, **named):
        return self._twice(self._inner.update(*given, **named))

    @staticmethod
    def _twice(decision):
        return type(decision)(decision.batch_size, decision.batch_size / 16, reason=decision.reason)


def test_a_scheduler_of_another_optimizer_is_refused():
    model = linear()
    stranger = schedulers.StepLR(SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(
        HessianFlowError, match="StepLR sets the rates of a different SGD: build it"
    ):
        trainer(model, SGD(model.parameters(), lr=0.1), schedule=Schedule(stranger))
    base = SGD(model.parameters(), lr=0.1)
    for owner in (base, SAM(base)):  # they share their groups
        trainer(model, SAM(base), schedule=Schedule(schedulers.StepLR(owner, 1)))


def test_rates_that_are_no_numbers_are_refused():
    class Relative(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.param_groups[0]["lr"] = None

    model = linear()
    with pytest.raises(
        HessianFlowError, match="group 0 of Relative has lr None, which a factor cannot multiply"
    ):
        trainer(model, Relative(model.parameters()))
    named = SimpleNamespace(step=lambda: None, state_dict=dict, load_state_dict=lambda state: None)
    named.param_groups = [{"params": list(model.parameters())}]
    with pytest.raises(HessianFlowError, match="group 0 of SimpleNamespace has lr None"):
        trainer(model, named)
