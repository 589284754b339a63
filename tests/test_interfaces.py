"""What is optional at a seam is a protocol: who offers it says so, and nothing else does."""

import pytest
import torch
from torch import nn

from hessianflow import interfaces
from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary, GradientReuse
from hessianflow.control import ABSA, CABS, AdaBatch, CriticalBatch, FixedBatch
from hessianflow.control.rate_rule import RateRule
from hessianflow.curvature import CallableOperator, CurvatureProbe, HessianOperator
from hessianflow.data import DeviceBatches
from hessianflow.normalisation.folded import TorchsInEvaluation
from hessianflow.normalisation.ghost import ghost_normalisation
from hessianflow.optim import GradientMoments, MicrobatchNorms
from hessianflow.optim.extrapolation import Extrapolation

MODEL = nn.Linear(3, 2)
PAIR = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
LOSS = nn.CrossEntropyLoss()
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
DATA = DeviceBatches(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), 2)
ATTACK = FGSM(0.1, value_range=None)

OFFERS = {
    "JoinsRanks": [GradientMoments(), MicrobatchNorms(), PGD(0.1, value_range=None)],
    "BindsParameters": [GradientMoments(), MicrobatchNorms()],
    "Budgeted": [CurvatureProbe(MODEL, LOSS, PAIR)],
    "MeasuresModel": [CurvatureProbe(MODEL, LOSS, PAIR)],
    "JudgesStatistics": [HessianOperator(MODEL, LOSS, PAIR)],
    "Capped": [ABSA(2, 4), CABS(16, 32), AdaBatch(2, 4)],
    "ForgetsReference": [ABSA(2, 4), CriticalBatch(2, 4), RateRule(ABSA(2, 4), "sqrt")],
    "Shardable": [DATA],
    "TellsPlace": [DATA],
    "Rewindable": [DATA],
    "WantsClosure": [Extrapolation(SGD, 0.1)],
    "InputAttack": [ATTACK],
    "BatchController": [FixedBatch(2), RateRule(ABSA(2, 4), "sqrt")],
}
LACK = {
    "JoinsRanks": [ConcurrentAdversary(ATTACK)],
    "BindsParameters": [ATTACK],
    "Budgeted": [HessianOperator(MODEL, LOSS, PAIR)],
    "MeasuresModel": [GradientMoments()],
    "JudgesStatistics": [CallableOperator(lambda v: v, 3)],
    "Capped": [RateRule(ABSA(2, 4), "sqrt")],
    "ForgetsReference": [FixedBatch(2), CABS(16, 32)],
    "Shardable": [[1, 2], [PAIR]],
    "TellsPlace": [[PAIR]],
    "Rewindable": [[PAIR], torch.utils.data.DataLoader([1, 2])],
    "ChecksRows": [DATA],
    "WantsClosure": [SGD],
    "SecondOrder": [SGD, Extrapolation(SGD, 0.1)],
    "InputAttack": [GradientReuse(DATA, value_range=None)],
    "BatchController": [GradientMoments(), 32],
}


@pytest.mark.parametrize("name", sorted({*OFFERS, *LACK}))
def test_a_seam_is_seen_where_it_is_offered_and_nowhere_else(name: str) -> None:
    seam = getattr(interfaces, name)
    for part in OFFERS.get(name, []):
        assert isinstance(part, seam), f"{type(part).__name__} offers {name}"
    for part in LACK.get(name, []):
        assert not isinstance(part, seam), f"{type(part).__name__} does not offer {name}"


def test_ghost_normalisation_says_that_it_is_torchs_in_evaluation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with ghost_normalisation(model, 2):
        assert isinstance(model[0], TorchsInEvaluation)
    assert not isinstance(model[0], TorchsInEvaluation)
