"""What is recorded after an epoch against the attacks and eigenvalues it stands for."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial import InputCurvature, InputHessian, RobustnessWatch, fgsm, pgd

EPS = 0.2


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    source = torch.Generator().manual_seed(1)
    return model, (torch.rand(30, 6, generator=source, dtype=torch.float64), torch.arange(30) % 3)


def accuracy(model, x, y):
    return (model(x).argmax(1) == y).double().mean().item()


def test_accuracies_are_those_under_the_attacks():
    model, (x, y) = problem()
    watch = RobustnessWatch(model, (x, y), EPS, value_range=(0, 1), seed=3)
    figures, warning = watch()
    source = torch.Generator().manual_seed(3)
    assert figures["fgsm_accuracy"] == accuracy(
        model, fgsm(model, x, y, EPS, value_range=(0, 1)), y
    )
    attacked = pgd(model, x, y, EPS, value_range=(0, 1), steps=10, generator=source)
    assert figures["pgd_accuracy"] == accuracy(model, attacked, y)
    assert warning == ""
    assert watch()[0] == figures  # the same random start every time


class Fooling(nn.Module):
    """Robust; once `collapsed`, its gradient at 0.5 points to where it is right, away from where it
    is wrong."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.collapsed = False

    def forward(self, x):
        move = self.scale * (x[:, 0] - 0.5)
        margin = (
            torch.where(move >= 0, 1 - 0.1 * move, 1 + 20 * move)
            if self.collapsed
            else 1 - 0.1 * move
        )
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_the_alarm_is_raised_and_survives_a_checkpoint():
    """FGSM goes right, where it fools nobody; PGD from a random start also goes left. The alarm
    knows the past."""
    model, batch = Fooling(), (torch.full((40, 1), 0.5), torch.zeros(40, dtype=torch.int64))
    watch, again = (
        RobustnessWatch(model, batch, 0.2, value_range=None, collapse=0.9) for _ in range(2)
    )
    assert watch() == ({"fgsm_accuracy": 1.0, "pgd_accuracy": 1.0}, "")
    model.collapsed = True
    again.load_state_dict(watch.state_dict())
    figures, warning = again()
    assert figures["fgsm_accuracy"] == 1.0
    assert 0.2 < figures["pgd_accuracy"] < 0.8
    assert warning.startswith("catastrophic overfitting: accuracy under PGD fell from 100.0%")
    assert again()[1] == ""  # once


def test_input_curvature_is_what_the_solver_finds():
    model, batch = problem()

    def dense(operator):
        columns = [operator.matvec(row) for row in torch.eye(operator.size, dtype=torch.float64)]
        return {"eigenvalue": float(torch.linalg.eigvalsh(torch.stack(columns))[-1])}

    figures, warning = InputCurvature(model, batch, dense)()
    expected = dense(InputHessian(model, *batch, cross_entropy))
    assert figures == expected
    assert warning == ""
    assert InputCurvature(model, batch, dense).state_dict() == {}


def test_bad_input_is_named():
    model, batch = problem()
    with pytest.raises(ValueError, match="collapse must lie between 0 and 1, got 2"):
        RobustnessWatch(model, batch, EPS, value_range=None, collapse=2)
