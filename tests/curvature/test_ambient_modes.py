"""Within autocast, no_grad or inference mode of the caller's, measurements are those of outside.

The oracle is the whole matrix by plain autograd, in float64.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from hessianflow import HessianFlowError
from hessianflow.adversarial import InputHessian
from hessianflow.curvature import (
    CurvatureProbe,
    HessianOperator,
    critical_rate,
    diagonal,
    frobenius_norm,
    noise_scale,
    spectral_density,
    top_eigenpairs,
    trace,
)
from hessianflow.training import evaluate

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def dense() -> Tensor:
    model = net().double()
    weights = list(model.parameters())
    loss = cross_entropy(model(INPUTS.double()), TARGETS)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)]
    )
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.fixture(params=["bfloat16", "float16", "no_grad", "inference"])
def mode(request):
    if request.param in ("bfloat16", "float16"):
        return torch.autocast("cpu", dtype=getattr(torch, request.param))
    return torch.no_grad() if request.param == "no_grad" else torch.inference_mode()


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_eigenvalues(mode, method):
    model, expected = net(), torch.linalg.eigvalsh(dense())[-1].item()
    with mode:
        found = top_eigenpairs(
            HessianOperator(model, cross_entropy, (INPUTS, TARGETS)), method=method, seed=0
        )
        reading = CurvatureProbe(model, cross_entropy, (INPUTS, TARGETS))()
    assert found.converged
    assert reading.converged
    assert found.values.item() == pytest.approx(expected, rel=1e-3)
    assert reading.eigenvalue == pytest.approx(expected, rel=1e-2)


def test_estimates(mode):
    model = net()

    def estimates() -> list[float]:
        operator = HessianOperator(model, cross_entropy, (INPUTS, TARGETS))
        density = spectral_density(operator, num_probes=2, steps=20, seed=0)
        return [
            trace(operator, num_matvecs=24, seed=0).value,
            diagonal(operator, num_matvecs=10, seed=0).values.norm().item(),
            frobenius_norm(operator, num_matvecs=10, seed=0).value,
            density.nodes.max().item(),
        ]

    outside = estimates()
    with mode:
        assert estimates() == pytest.approx(outside, rel=1e-5)


def test_gradients_noise_and_critical_rates(mode):
    model = net()
    optimizer = SGD(model.parameters(), 0.1)

    def figures() -> list[float]:
        noise = noise_scale(model, cross_entropy, (INPUTS, TARGETS), parts=5)
        gradient = HessianOperator(model, cross_entropy, (INPUTS, TARGETS)).gradient()
        rates = [
            critical_rate(model, cross_entropy, (INPUTS, TARGETS), optimizer, form=form).critical
            for form in ("product", "forward")
        ]
        return [noise.simple.numerator, noise.with_curvature.numerator, *gradient.tolist(), *rates]

    outside = figures()
    with mode:
        assert figures() == pytest.approx(outside, rel=1e-5)


def test_evaluation_in_inference_mode():
    model = net()
    expected = cross_entropy(model(INPUTS), TARGETS).item()
    with torch.inference_mode():
        assert evaluate(model, (INPUTS, TARGETS), cross_entropy).loss == pytest.approx(
            expected, rel=1e-6
        )


def test_weights_of_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        model = net()
    with pytest.raises(
        HessianFlowError, match=r"the parameter '0.weight' was made within torch.inference_mode\(\)"
    ):
        CurvatureProbe(model, cross_entropy, (INPUTS, TARGETS))()


def test_input_curvature_refuses_integers():
    with pytest.raises(HessianFlowError, match=r"got torch.uint8; convert them"):
        InputHessian(net(), INPUTS.byte(), TARGETS)
