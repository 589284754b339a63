"""Whose gradients observers are shown: CLARS with parameters in another order than the model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer
from hessianflow.data import DeviceBatches
from hessianflow.optim import CLARS, LARS, MicrobatchNorms
from hessianflow.training import Passes, Reporting


def network() -> nn.Sequential:
    """Layers of one shape, so that no shape tells them apart, with gradients of different
    lengths."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.mul_(10)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    source = torch.Generator().manual_seed(1)
    data = DeviceBatches(
        torch.randn(24, 1, 2, 2, generator=source), torch.randint(4, (24,), generator=source), 8
    )
    settings: dict[str, Any] = {
        "loss_fn": F.cross_entropy,
        "epochs": 2,
        "reporting": Reporting(show_progress=False),
    }
    AdaptiveBatchTrainer(model, data, optimizer=optimizer, **settings, **options).fit()


def by_clars(make: Callable[[nn.Sequential], CLARS], microbatch_size: int = 2) -> nn.Sequential:
    model = network()
    optimizer = make(model)
    train(
        model,
        optimizer,
        observers=[optimizer.norms],
        passes=Passes(microbatch_size=microbatch_size),
    )
    return model


def backwards(model: nn.Sequential) -> list[nn.Parameter]:
    return list(model.parameters())[::-1]


def in_groups(model: nn.Sequential) -> CLARS:
    return CLARS([{"params": [p]} for p in backwards(model)], 0.5, max_rate=None)


def in_one_group(model: nn.Sequential) -> CLARS:
    return CLARS(backwards(model), 0.5, max_rate=None)


def with_norms(model: nn.Sequential) -> CLARS:
    return CLARS(model.parameters(), 0.5, max_rate=None, norms=MicrobatchNorms(backwards(model)))


@pytest.mark.parametrize("make", [in_groups, in_one_group, with_norms])
def test_another_order_trains_the_same(make: Callable[[nn.Sequential], CLARS]):
    """As in the model's order, bit for bit."""
    ours, theirs = (
        by_clars(make),
        by_clars(lambda model: CLARS(model.parameters(), 0.5, max_rate=None)),
    )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_one_microbatch_a_step_is_lars():
    """The norm of each layer is that of its own gradient then: LARS, up to the order of its
    operations."""
    ours, theirs = by_clars(in_groups, microbatch_size=8), network()
    train(theirs, LARS(theirs.parameters(), 0.5, trust_coefficient=0.01, form="late"))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_gradients_that_the_optimizer_has_no_use_for_are_shown_too():
    start, ours = network(), by_clars(lambda model: CLARS(model[3].parameters(), 0.5))
    same = [torch.equal(a, b) for a, b in zip(start.parameters(), ours.parameters(), strict=True)]
    assert same == [True, True, False]
