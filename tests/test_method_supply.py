"""Constructors with parameters that no option can hold, and defaults that are no plain values."""

import enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.choices import build_optimizer
from hessianflow.config import TrainConfig, to_dict
from hessianflow.interfaces import HessianFlowError
from hessianflow.resolve import resolve


class Graft(enum.IntEnum):
    SGD = 1


class Around(torch.optim.SGD):
    def __init__(
        self, params: list[Tensor], base_optimizer: type[Optimizer], lr: float = 0.1
    ) -> None:
        super().__init__(params, lr)


class Grafted(torch.optim.SGD):
    def __init__(self, params: list[Tensor], lr: float = 0.1, graft: int = Graft.SGD) -> None:
        super().__init__(params, lr)


class Failing(torch.optim.SGD):
    def __init__(self, params: list[Tensor], lr: float = 0.1) -> None:
        raise RuntimeError("not this one\nfor a long reason")


class InGroups(torch.optim.SGD):
    """The weights at a tenth of the rate."""

    @staticmethod
    def groups_of(model: nn.Module) -> list[dict[str, Any]]:
        first, *others = model.parameters()
        return [{"params": others}, {"params": [first], "nesterov": True}]


def chosen(method: type, **settings: Any) -> Any:
    return resolve(TrainConfig(optimizer=f"{__name__}:{method.__name__}", lr=0.2, **settings))


def test_a_class_that_no_option_can_hold_is_asked_of_a_function() -> None:
    with pytest.raises(
        HessianFlowError, match="needs base_optimizer, which no option can"
    ) as caught:
        chosen(Around)
    assert str(caught.value).endswith(
        "write a function that makes it from what it names of lr, model, norms, params, and give"
        " --optimizer module:function"
    )


def test_a_named_number_is_a_number_in_the_settings() -> None:
    config = chosen(Grafted)
    assert type(config.optimizer.options["graft"]) is int
    assert to_dict(config)["optimizer"]["graft"] == 1


def test_whatever_a_foreign_constructor_raises_is_told_on_one_line() -> None:
    with pytest.raises(HessianFlowError, match=r"Failing: not this one$"):
        chosen(Failing)


def test_an_optimizer_that_says_so_gets_its_own_groups() -> None:
    model = nn.Linear(3, 2)
    config = resolve(
        TrainConfig(optimizer={"name": f"{__name__}:InGroups", "momentum": 0.9}, lr=0.2)  # type: ignore[arg-type]
    )
    groups = build_optimizer(config, model).param_groups
    assert [group["params"] for group in groups] == [[model.bias], [model.weight]]
    assert [group["nesterov"] for group in groups] == [False, True]
