"""Our LARS against an independent implementation: that of the pytorch_optimizer package, installed
apart."""

import copy

import pytest
import torch
from peers import library
from torch import nn

from hessianflow.optim import LARS

pytorch_optimizer = library("pytorch_optimizer")


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, decay_rate: float
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(30):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= decay_rate
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("form", "decay_rate"),
    [("paper", 1.0), ("outside", 1.0), ("outside", 0.9)],
    ids=["paper", "outside", "decaying"],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_agrees(form: str, decay_rate: float, weight_decay: float) -> None:
    """That implementation takes the rate outside the buffer, which is the paper's step at a
    constant rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    other = copy.deepcopy(model)
    options = {"momentum": 0.9, "weight_decay": weight_decay, "trust_coefficient": 0.02}
    ours = LARS([p for p in model.parameters() if p.ndim > 1], 1.0, form=form, **options)  # type: ignore[arg-type]
    theirs = pytorch_optimizer.LARS(
        [p for p in other.parameters() if p.ndim > 1], lr=1.0, foreach=False, **options
    )
    for p, q in zip(train(model, ours, decay_rate), train(other, theirs, decay_rate), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
