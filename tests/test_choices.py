"""What the names in a configuration stand for."""

from typing import Any

import pytest
from torch import nn

from hessianflow import HessianFlowError
from hessianflow.choices import build_optimizer, build_scheduler
from hessianflow.config import TrainConfig
from hessianflow.resolve import resolve
from hessianflow.upgrade import upgrade


@pytest.mark.parametrize(("correction", "form"), [(False, "paper"), (True, "outside")])
def test_momentum_correction_takes_the_rate_out_of_the_velocity_of_lars(
    correction: bool, form: str
):
    """That is what the setting of earlier releases is today; the option itself reaches lars too."""
    older = upgrade({"optimizer": "lars", "momentum_correction": correction})
    for settings in (older, {"optimizer": {"name": "lars", "form": form}}):
        config = resolve(TrainConfig(**settings))
        assert build_optimizer(config, nn.Linear(2, 2)).param_groups[0]["form"] == form


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adam", "capturable": True},
        {"name": "sam", "base": {"name": "adamw", "capturable": True}},
    ],
)
def test_torch_can_capture_no_step_on_a_processor(optimizer: dict[str, Any]) -> None:
    """It would say so in the first step, by an assertion that names no option."""
    config = resolve(TrainConfig(optimizer=optimizer, lr=0.01))
    with pytest.raises(HessianFlowError, match=r"capturable true of adamw? needs a GPU"):
        build_optimizer(config, nn.Linear(2, 2))


def cooldown(decay_from: float) -> dict[str, Any]:
    return {"name": "cooldown", "decay_from": decay_from}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"epochs": 5, "schedule": cooldown(1)}, [1, 1, 0.75, 0.5, 0.25]),
        ({"epochs": 5}, [1, 1, 1, 1, 0.5]),  # from two thirds of 5 on, rounded down
        ({"epochs": 3}, [1, 1, 0.5]),
        ({"epochs": 2}, [1, 0.5]),
        ({"epochs": 1}, [1]),
        (
            {"epochs": 4, "schedule": cooldown(0), "controller": "critical"},
            [1, 0.75, 0.5, 0.25],
        ),
    ],
)
def test_cooldown_is_constant_and_then_falls_by_the_epoch(
    settings: dict[str, Any], rates: list[float]
):
    config = resolve(TrainConfig(lr=1.0, **{"schedule": "cooldown", **settings}))
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler, unit = build_scheduler(config, optimizer, 1000)
    assert unit == "epoch"
    assert scheduler is not None
    found = []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


def test_cooldown_after_a_warmup_falls_by_the_batch():
    """Two of ten batches an epoch up, then from the middle of 4 epochs on down to the last
    batch."""
    settings: dict[str, Any] = {
        "epochs": 4,
        "schedule": cooldown(2),
        "warmup_epochs": 0.2,
        "batch_size": 10,
    }
    config = resolve(TrainConfig(lr=1.0, **settings))
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler, unit = build_scheduler(config, optimizer, 100)
    assert unit == "reference_batch"
    assert scheduler is not None
    found = []
    for _ in range(40):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found[:3] == pytest.approx([0.5, 1, 1])
    assert [found[20], found[21], found[39]] == pytest.approx([1, 0.95, 0.05])


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [("torch.optim:NAdam", "sqrt"), ("torch.optim:SGD", None), ("adam", "sqrt"), ("sgd", None)],
)
def test_the_rate_of_another_optimizer_follows_the_root_of_the_batch(
    optimizer: str, rule: str | None
) -> None:
    config = resolve(TrainConfig(optimizer=optimizer, lr=0.01, controller="absa"))
    assert config.lr_rule == rule
