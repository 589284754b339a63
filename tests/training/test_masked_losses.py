"""Regression on targets of which some are missing: a part of a batch in which nothing counts adds
nothing.

The oracle is the loss of the whole batch in one pass, and its gradient by plain autograd.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer
from hessianflow.data import AdaptiveBatches
from hessianflow.losses import weighted
from hessianflow.training import Passes, Reporting, evaluate


def selected(outputs: Tensor, targets: Tensor) -> Tensor:
    known = ~targets.isnan()
    return (outputs[known] - targets[known]).square().mean()


def of_torch(outputs: Tensor, targets: Tensor) -> Tensor:
    known = ~targets.isnan()
    return nn.functional.mse_loss(outputs[known], targets[known])


def divided(outputs: Tensor, targets: Tensor) -> Tensor:
    known = ~targets.isnan()
    errors = torch.where(known, outputs - targets.nan_to_num(), 0.0)
    return errors.square().sum() / known.sum()


def data() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=source, dtype=torch.float64)
    targets = torch.randn(32, 3, generator=source, dtype=torch.float64)
    targets[torch.rand(32, 3, generator=source) < 0.4] = torch.nan
    targets[:8] = torch.nan  # two microbatches without a target
    return inputs, targets


@pytest.mark.parametrize("loss_fn", [selected, of_torch, divided])
def test_a_microbatch_without_a_target_adds_nothing(loss_fn):
    inputs, targets = data()
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    start = model.weight.detach().clone()
    (expected,) = torch.autograd.grad(selected(model(inputs), targets), model.weight)
    AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(TensorDataset(inputs, targets), 32, shuffle=False),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        loss_fn=loss_fn,
        epochs=1,
        passes=Passes(microbatch_size=4),
        reporting=Reporting(show_progress=False),
    ).fit()
    torch.testing.assert_close(start - model.weight, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_fn", [selected, of_torch, divided])
def test_an_evaluated_batch_without_a_target_adds_nothing(loss_fn):
    inputs, targets = data()
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    expected = selected(model(inputs), targets).item()
    assert evaluate(model, batches, loss_fn).loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0.0)])
def test_nothing_weighs_nothing(weight):
    assert weighted(torch.tensor(torch.nan), weight).item() == 0
