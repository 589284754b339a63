"""Oracle: the same scheduler run alone; the factor must multiply what it gives, step by step."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers

from hessianflow.training.learning_rate import LearningRate

MAKERS = {
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 4], gamma=0.2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=8, power=2),
    "one-cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=20, cycle_momentum=False),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
}
FACTORS = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 0.5]


def optimizer() -> SGD:
    return SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}]
    )


@pytest.mark.parametrize("name", MAKERS)
def test_factor_multiplies_any_schedule(name: str):
    alone, with_factor = optimizer(), optimizer()
    reference, rate = MAKERS[name](alone), LearningRate(with_factor, MAKERS[name](with_factor))
    for factor in FACTORS:
        rate.set_factor(factor)
        for group, plain in zip(with_factor.param_groups, alone.param_groups, strict=True):
            assert group["lr"] == pytest.approx(plain["lr"] * factor, rel=1e-12)
        assert rate.value == with_factor.param_groups[0]["lr"]
        alone.step()
        with_factor.step()
        reference.step()
        rate.step()


def test_plateau_is_fed_the_metric():
    opt = optimizer()
    rate = LearningRate(opt, schedulers.ReduceLROnPlateau(opt, factor=0.1, patience=0))
    rate.set_factor(4.0)
    rate.step(1.0)
    assert rate.value == pytest.approx(0.4)
    rate.step(2.0)  # worse than 1.0: the scheduled rate falls tenfold, the factor stays
    assert rate.value == pytest.approx(0.04)


def test_factor_is_absolute_and_applies_without_a_scheduler():
    opt = optimizer()
    rate = LearningRate(opt)
    rate.set_factor(2.0)
    rate.set_factor(2.0)
    rate.step()
    assert [group["lr"] for group in opt.param_groups] == [0.2, 2.0]


@pytest.mark.parametrize("name", MAKERS)
def test_saved_and_loaded_continues(name: str):
    first = optimizer()
    rate = LearningRate(first, MAKERS[name](first))
    for _ in range(3):
        first.step()
        rate.step()
    rate.set_factor(3.0)
    second = optimizer()
    again = LearningRate(second, MAKERS[name](second))
    second.load_state_dict(first.state_dict())
    again.load_state_dict(rate.state_dict())
    for _ in range(4):
        for pair in (first, second):
            pair.step()
        rate.step()
        again.step()
        assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]


def test_a_rate_kept_in_a_tensor_is_filled_in_place():
    parameter = nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([parameter], lr=torch.tensor(0.5), capturable=False, foreach=False)
    held = opt.param_groups[0]["lr"]
    LearningRate(opt).set_factor(2.0)
    assert opt.param_groups[0]["lr"] is held
    assert held.item() == 1.0
