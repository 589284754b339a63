"""A loss whose parts do not add up is refused where ranks share a batch, as it is where one process
cuts it."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator
from hessianflow.distributed.curvature import sharded
from hessianflow.interfaces import HessianFlowError

ROWS = 12


@dataclass
class TwoRanks:
    """Stands in for the group: the other rank holds the same numbers, times a factor."""

    rank: int
    world_size: int = 2
    other: float = 1.0
    sums: int = 0

    def sum(self, tensor):
        self.sums += 1
        return tensor + self.other * tensor


def two_divisors(outputs, targets):
    return F.cross_entropy(outputs, targets) + outputs.square().mean()


def batch(padding):
    source = torch.Generator().manual_seed(0)
    targets = torch.arange(ROWS) % 3
    targets[padding] = -100
    return torch.randn(ROWS, 4, generator=source), targets


@pytest.mark.parametrize("make", [HessianOperator, GGNOperator, FisherOperator])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_divisors_are_refused(make, rank):
    torch.manual_seed(0)
    ranks = TwoRanks(rank)
    with pytest.raises(HessianFlowError, match="weighted by what cross_entropy divides by"):
        sharded(ranks, make)(nn.Linear(4, 3), two_divisors, batch([1, 2, 7, 9]))
    assert ranks.sums == 1  # no rank waits for another


def test_a_rank_learns_that_another_failed():
    with pytest.raises(HessianFlowError, match="another rank cannot measure"):
        sharded(TwoRanks(0, other=math.nan))(nn.Linear(4, 3), F.cross_entropy, batch([1]))


@pytest.mark.parametrize("make", [HessianOperator, GGNOperator])
def test_a_loss_that_adds_up_and_a_batch_that_is_not_shared_are_not(make):
    torch.manual_seed(0)
    for ranks, loss, padding in (
        (TwoRanks(0), lambda o, t: 2 * F.cross_entropy(o, t), [1, 2, 7, 9]),
        (TwoRanks(0, world_size=1), two_divisors, [1, 2]),
    ):
        operator = sharded(ranks, make)(nn.Linear(4, 3), loss, batch(padding))
        assert operator.matvec(torch.ones(operator.size)).isfinite().all()
