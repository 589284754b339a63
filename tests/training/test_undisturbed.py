"""What must not disturb training, and what training must not disturb: equality with the run that
goes without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from torch import Tensor, nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, HessianFlowError, History
from hessianflow.build import build_trainer
from hessianflow.config import TrainConfig
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import Augmentation, DeviceBatches
from hessianflow.resolve import resolve
from hessianflow.runs import checkpoints
from hessianflow.training import Checkpoints, Reporting, evaluate

N = 50


def data() -> DeviceBatches:
    return bright_or_dark(N, augment=Augmentation(crop_padding=1, flip=True))


def network() -> nn.Module:
    """Batch normalisation and dropout: what an evaluation in the middle could move."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 2),
    )


def trainer(model: nn.Module, evaluation: Any = None, **options: Any) -> AdaptiveBatchTrainer:
    settings: dict[str, Any] = {
        "epochs": 3,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return AdaptiveBatchTrainer(
        model, data(), evaluation, optimizer=optimizer, **(settings | options)
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


@pytest.mark.parametrize("way", ["evaluation", "probe", "progress bar", "run directory"])
def test_watching_changes_no_weight(way: str, tmp_path: Path):
    """Dropout after it draws the same numbers, running statistics do not see the test images."""
    plain, watched, sample = network(), network(), data().sample(20)
    torch.manual_seed(5)
    trainer(plain).fit()
    options: dict[str, dict[str, Any]] = {
        "evaluation": {"evaluation": (sample[0] + 3, sample[1])},
        "probe": {"probe": CurvatureProbe(watched, F.cross_entropy, sample)},
        "progress bar": {"reporting": Reporting(show_progress=True)},
        "run directory": {
            "run_dir": tmp_path / "run",
            "checkpoints": Checkpoints(every_examples=16),
        },
    }
    torch.manual_seed(5)
    trainer(watched, **options[way]).fit()
    assert torch.equal(weights(watched), weights(plain))


@pytest.mark.parametrize("kind", ["tuple", "list", "batches", "list of lists"])
def test_evaluation_data_of_every_form_give_the_same_figures(kind: str):
    """A pair may be a list; parts of unequal size are weighted by what they hold."""
    model, (x, y) = network().eval(), data().sample(20)
    forms: dict[str, Any] = {
        "tuple": (x, y),
        "list": [x, y],
        "batches": [(x[:13], y[:13]), (x[13:], y[13:])],
        "list of lists": [[x[:13], y[:13]], [x[13:], y[13:]]],
    }
    with torch.no_grad():
        outputs = model(x)
    found = evaluate(model, forms[kind], F.cross_entropy)
    assert found.examples == 20
    assert found.loss == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert found.accuracy == (outputs.argmax(1) == y).double().mean().item()
    assert trainer(network(), forms[kind], epochs=1).fit().epochs[0]["eval_accuracy"] is not None


def test_frozen_batch_normalisation_stays_frozen():
    """Statistics and affine parameters as they were, used in evaluation mode, as in the bare loop;
    flags come back."""
    found = []
    for bare in (True, False):
        model = network()
        model[1].running_mean.fill_(0.2)
        model[1].running_var.fill_(0.5)
        model[1].requires_grad_(False)
        model.train()
        model[1].eval()
        before = {k: v.clone() for k, v in model[1].state_dict().items()}
        if bare:
            optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
            )
            stream = data()
            for _ in range(3):
                for x, y in stream:
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
        else:
            trainer(model, data().sample(20)).fit()
        assert all(torch.equal(v, before[k]) for k, v in model[1].state_dict().items())
        assert [module.training for module in model] == [True, False, True, True, True, True]
        found.append(weights(model))
    assert torch.equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("adversary", ["fgsm", "pgd"])
def test_the_same_run_twice_is_bit_equal(adversary: Any, tmp_path: Path):
    """Every stream comes from the one seed, whatever the global generators hold; another seed gives
    another run."""
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(1000 + number)
        torch.rand(number + 1)
        config = TrainConfig(
            epochs=3,
            train_examples=256,
            test_examples=64,
            max_batch_size=128,
            controller={"name": "absa", "patience": 1},
            adversary=adversary,
            seed=seed,
            device="cpu",
            run_dir=str(tmp_path / str(number)),
        )
        made = build_trainer(resolve(config))
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in made.fit().records]
        runs.append((weights(made.model), rows))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


class Spare(nn.Module):
    """A network that holds a weight which the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare = network(), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_weights_that_are_not_finite_are_never_saved_whatever_the_loss(tmp_path: Path):
    model = Spare()

    def poison(inputs: Tensor, targets: Tensor, progress: Any) -> tuple[Tensor, Tensor]:
        if progress.updates == 9:
            model.spare.data[1] = float("nan")
        return inputs, targets

    made = trainer(
        model,
        run_dir=tmp_path / "run",
        transform=poison,
        checkpoints=Checkpoints(every_examples=16),
    )
    with pytest.raises(
        HessianFlowError, match=r"or a weight was not finite, .* in epoch 2 at update 1"
    ):
        made.fit()
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(torch.isfinite(v).all() for v in checkpoints.load(file)["model"].values()), file
    assert History.load(tmp_path / "run").of_kind("event")[-1]["event"] == "diverged"


def test_tensorboard_needs_a_place():
    with pytest.raises(HessianFlowError, match="--tensorboard needs --run-dir"):
        build_trainer(resolve(TrainConfig(tensorboard=True, device="cpu")))
