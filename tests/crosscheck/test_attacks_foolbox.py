"""Our attacks against an independent implementation: those of the foolbox package, installed apart.

Random starts are off: the two draw from different generators.
"""

import pytest
import torch
from peers import library
from torch import nn

from hessianflow.adversarial import fgsm, pgd

foolbox = library("foolbox")

EPS, STEPS, RELATIVE_STEP = 0.05, 12, 0.2


def problem(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.rand(10, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model.to(dtype).eval(), x.to(dtype), torch.arange(10) % 5


def theirs(attack: object, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, clipped, _ = attack(wrapped, x, y, epsilons=EPS)  # type: ignore[operator]
    assert isinstance(clipped, torch.Tensor)
    return clipped


def pgd_options() -> dict[str, object]:
    return {
        "steps": STEPS,
        "relative_step": RELATIVE_STEP,
        "random_start": False,
        "value_range": (0, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fgsm_agrees(dtype: torch.dtype) -> None:
    model, x, y = problem(dtype)
    expected = theirs(foolbox.attacks.LinfFastGradientAttack(random_start=False), model, x, y)
    torch.testing.assert_close(
        fgsm(model, x, y, EPS, value_range=(0, 1)), expected, rtol=0, atol=1e-6
    )
    assert (expected - x).abs().max() > 0.9 * EPS


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_pgd_agrees(norm: str) -> None:
    """float64: after several steps of sign(g), rounding of a gradient near zero would show as a
    whole step."""
    model, x, y = problem(torch.float64)
    kind = foolbox.attacks.LinfPGD if norm == "l_inf" else foolbox.attacks.L2PGD
    expected = theirs(
        kind(rel_stepsize=RELATIVE_STEP, steps=STEPS, random_start=False), model, x, y
    )
    ours = pgd(model, x, y, EPS, norm=norm, **pgd_options())  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert not torch.equal(ours, x)


def test_targeted_pgd_agrees() -> None:
    model, x, y = problem(torch.float64)
    targets = (y + 1) % 5
    criterion = foolbox.criteria.TargetedMisclassification(targets)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=RELATIVE_STEP, steps=STEPS, random_start=False)
    expected = theirs(attack, model, x, criterion)
    ours = pgd(model, x, targets, EPS, targeted=True, **pgd_options())  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
