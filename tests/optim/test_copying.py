"""Copies and pickles of optimizers, which torch makes from defaults, state and groups alone."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hessianflow.optim import LAMB, LARS, SAM, Extrapolation, Muon, muon_groups

Make = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "lamb": lambda model: LAMB(model.parameters(), 0.01, max_grad_norm=0.1),
    "lars": lambda model: LARS(model.parameters(), 0.1),
    "muon": lambda model: Muon(muon_groups(model), 0.1, rest="adamw"),
    "sam": lambda model: SAM(SGD(model.parameters(), 0.1, momentum=0.9), rho=0.2),
    "extrapolation": lambda model: Extrapolation(SGD(model.parameters(), 0.1), 0.05),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


def steps(model: nn.Module, optimizer: Optimizer, count: int) -> list[Tensor]:
    inputs = torch.linspace(-1, 1, 12).reshape(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(count):
        if isinstance(optimizer, (SAM, Extrapolation)):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_copy_steps_as_the_original_and_apart_from_it(make: Make, copied: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(model)
    steps(model, optimizer, 2)
    twin, its_optimizer = copied((model, optimizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = steps(twin, its_optimizer, 3)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, found, steps(model, optimizer, 3)))


def test_a_copy_of_an_optimizer_under_a_schedule_steps_its_own_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Muon(muon_groups(model), 0.1)
    LambdaLR(optimizer, lambda _: 1.0)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    before = steps(twin, its_optimizer, 0)
    assert not torch.equal(before[0], steps(twin, its_optimizer, 1)[0])
    assert torch.equal(before[0], model[0].weight)


def test_a_copy_of_muon_takes_further_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin = copy.deepcopy(Muon(muon_groups(model), 0.1, rest="adamw"))
    twin.add_param_group({"params": [nn.Parameter(torch.ones(3))], "part": "rest"})
    assert twin.param_groups[-1]["rule"] == "adamw"
