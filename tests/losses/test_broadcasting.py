"""Outputs [N, 1] beside targets [N] are broadcast to [N, N]: parts of a batch do not add up to it.

One pass over the whole is what torch computes; whoever cuts it must be refused, for the matrix and
the gradient would depend on the cut.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.curvature import GGNOperator, HessianOperator
from hessianflow.data import AdaptiveBatches
from hessianflow.training import Passes, Reporting

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LOSSES = [functional.mse_loss, nn.MSELoss(), nn.SmoothL1Loss(), nn.HuberLoss(), functional.l1_loss]
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1).double()


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_an_operator_refuses_to_cut_it(operator, loss_fn):
    with pytest.raises(
        HessianFlowError,
        match=r"outputs of shape \[4, 1\] and targets of shape \[4\] are broadcast",
    ):
        operator(net(), loss_fn, (INPUTS, TARGETS), microbatch_size=5).dense()


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_training_refuses_to_cut_it(loss_fn):
    model = net()
    trainer = AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(TensorDataset(INPUTS, TARGETS), 6),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=loss_fn,
        epochs=1,
        passes=Passes(microbatch_size=3),
        reporting=Reporting(show_progress=False),
    )
    with pytest.raises(HessianFlowError, match="are broadcast"):
        trainer.fit()


def test_the_whole_is_what_torch_computes():
    model = net()
    loss = (model(INPUTS) - TARGETS).square().mean()
    gradient = torch.autograd.grad(loss, model.weight, create_graph=True)[0].flatten()
    expected = torch.stack(
        [torch.autograd.grad(g, model.weight, retain_graph=True)[0].flatten() for g in gradient]
    )
    found = HessianOperator(model, nn.MSELoss(), (INPUTS, TARGETS), params="weight").dense()
    torch.testing.assert_close(found, expected)


def test_rows_that_are_paired_may_be_cut():
    model, targets = nn.Linear(4, 3).double(), TARGETS[:, None]  # [N, 3] beside [N, 1]
    whole = HessianOperator(model, nn.MSELoss(), (INPUTS, targets)).dense()
    torch.testing.assert_close(
        HessianOperator(model, nn.MSELoss(), (INPUTS, targets), microbatch_size=5).dense(), whole
    )
