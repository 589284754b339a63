"""Examples of a type that the weights do not take are refused in one line: which types, and what to
convert."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.curvature import CurvatureProbe, FisherOperator, GGNOperator, HessianOperator
from hessianflow.data import AdaptiveBatches
from hessianflow.training import Reporting, evaluate

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (16,), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, pair: tuple[Tensor, Tensor]) -> None:
    AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(TensorDataset(*pair), 8),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=cross_entropy,
        epochs=1,
        reporting=Reporting(show_progress=False),
    ).fit()


USES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], object]] = {
    "training": train,
    "evaluation": lambda model, pair: evaluate(model, pair, cross_entropy),
    "probe": lambda model, pair: CurvatureProbe(model, cross_entropy, pair)(),
    "Hessian": lambda model, pair: HessianOperator(model, cross_entropy, pair).dense(),
    "GGN": lambda model, pair: GGNOperator(model, cross_entropy, pair).dense(),
    "Fisher": lambda model, pair: FisherOperator(model, cross_entropy, pair).dense(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (
            (INPUTS.double(), TARGETS),
            "inputs of torch.float64 and targets of torch.int64 with weights of torch",
        ),
        ((INPUTS.byte(), TARGETS), "inputs of torch.uint8"),
        ((INPUTS, TARGETS.int()), "targets of torch.int32"),
        ((INPUTS, TARGETS.double()), "targets of torch.float64"),
    ],
    ids=["float64", "uint8", "int32", "classes as floats"],
)
def test_types_are_named(use, pair, said):
    with pytest.raises(HessianFlowError, match=said):
        USES[use](nn.Linear(4, 3), pair)


def test_convolutions_and_embeddings_say_it_in_other_words():
    images = torch.randn(16, 1, 4, 4, dtype=torch.float64)
    for model, inputs in (
        (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), images),
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)), INPUTS),
    ):
        with pytest.raises(HessianFlowError, match="does not take inputs of torch"):
            evaluate(model, (inputs, TARGETS), cross_entropy)


@pytest.mark.parametrize("use", USES)
def test_other_errors_are_those_of_the_model(use):
    class Broken(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("the sensor is offline")

    with pytest.raises(RuntimeError, match="the sensor is offline"):
        USES[use](Broken(4, 3), (INPUTS, TARGETS))
