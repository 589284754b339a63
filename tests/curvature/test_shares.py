"""Shares of a spectrum by sign: what is 0 up to rounding, or too near to see, is on neither side.

Oracles: the measure of the start on a diagonal, in closed form; dense eigenvalues by autograd.
"""

import numpy as np
import pytest
import torch
from problems import Problem, classification, dense_hessian, mlp, operator_of, symmetric, train

from hessianflow.curvature import CallableOperator, HessianOperator, spectral_density
from hessianflow.curvature.density import SpectralDensity
from hessianflow.curvature.shares import mass_limits
from hessianflow.curvature.vectors import gaussian, generator


def diagonal(values):
    return CallableOperator(lambda v: values * v, len(values), values.dtype)


def half_zero(n=120):
    """Half of it 0, the rest of either sign over six orders of magnitude."""
    sizes = torch.logspace(-6, 0, n // 2, dtype=torch.float64)
    signs = torch.where(torch.arange(n // 2) % 3 == 0, -1.0, 1.0)
    return torch.cat([torch.zeros(n - n // 2, dtype=torch.float64), sizes * signs])


MEASURES = {
    "half of it zero": half_zero(),
    "symmetric about zero": torch.linspace(-1, 1, 101, dtype=torch.float64),
    "outliers over a bulk": torch.tensor(
        [5.0, -2.0, *torch.linspace(-0.1, 0.4, 98).tolist()]
    ).double(),
}


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("name", MEASURES)
def test_the_mass_of_the_start_lies_between_its_limits(name, steps):
    """Whatever the spectrum; the limits are those of all measures with the same moments."""
    values = MEASURES[name]
    operator = diagonal(values)
    found = spectral_density(operator, num_probes=1, steps=steps, seed=3)
    start = gaussian(operator, generator(3, operator.device))
    parts = start**2 / (start**2).sum()
    for edge in (-1.5, -1.0, -0.3, -1e-3, 0.0, 1e-4, 0.05, 0.5, 1.0, 6.0):
        least, most = mass_limits(found.recurrences[0], edge, edge)
        assert least - 1e-9 <= float(parts[values < edge].sum())
        assert float(parts[values <= edge].sum()) <= most + 1e-9


def test_limits_close_as_steps_grow():
    values = MEASURES["outliers over a bulk"]
    widths = []
    for steps in (5, 20, 60):
        found = spectral_density(diagonal(values), num_probes=1, steps=steps, seed=0)
        least, most = mass_limits(found.recurrences[0], 0.1, 0.1)
        widths.append(most - least)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_regression_with_more_weights_than_examples_has_no_negative_eigenvalue(sign, dtype):
    """H = 2/10 X^T X: of 100 eigenvalues 90 are 0, and rounding puts them on either side."""
    torch.manual_seed(0)
    net = torch.nn.Linear(100, 1, bias=False).to(dtype)
    batch = torch.randn(10, 100, dtype=dtype), torch.randn(10, 1, dtype=dtype)
    operator = sign * HessianOperator(net, torch.nn.functional.mse_loss, batch)
    found = spectral_density(operator, num_probes=5, steps=40, seed=0).shares()
    none, some = (found.negative, found.positive)[::sign]
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    assert some.low <= 0.1 <= some.high < 0.2
    assert 0.8 < found.zero.low <= 0.9 <= found.zero.high


def with_dead_inputs(dtype):
    """A trained classifier whose inputs are 0 in two of five columns, as images at their edges."""
    problem = classification(mlp((10, 8, 4), dtype=dtype), (10,), 40, 4)
    inputs = problem.inputs * (torch.arange(10) % 5 > 1)
    problem = Problem(problem.model, problem.loss_fn, inputs, problem.targets)
    train(problem, 60, lr=0.2)
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [10, 40, 120])
def test_shares_of_a_network_cover_the_dense_ones(dtype, steps):
    problem = with_dead_inputs(dtype)
    exact = torch.linalg.eigvalsh(dense_hessian(problem).double())
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    density = spectral_density(operator, num_probes=3, steps=steps, seed=0)
    found, noise = density.shares(), max(density.noise, 1e-12)
    parts = (exact < -noise, exact.abs() <= noise, exact > noise)
    truth = [float(part.double().mean()) for part in parts]
    assert truth[0] > 0.05
    assert truth[1] > 0.2
    for share, true in zip((found.negative, found.zero, found.positive), truth, strict=True):
        assert share.low <= true <= share.high
        assert share.low <= share.value <= share.high
    assert found.negative.value + found.zero.value + found.positive.value == pytest.approx(1.0)
    assert found.zone[0] < 0 < found.zone[1]
    mass = density.mass_below(0.0)
    below = float((exact < -noise).double().mean())
    assert abs(mass.value - below) <= 2 * mass.stderr
    assert mass.stderr < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("edge", [0.0, 1e-3, 0.1])
def test_two_errors_cover_the_mass_below_a_value(edge, probes):
    """95 % of 100 runs, less twice the standard error of that."""
    values = half_zero()
    truth, covered = float((values < edge).double().mean()), 0
    for seed in range(100):
        found = spectral_density(diagonal(values), num_probes=probes, steps=25, seed=seed)
        mass = found.mass_below(edge)
        covered += abs(mass.value - truth) <= 2 * mass.stderr
    assert covered >= 91


@pytest.mark.parametrize("negative", [0, 1, 30])
def test_a_definite_matrix_has_none_and_one_negative_value_is_seen(negative):
    values = torch.linspace(0.5, 1, 100, dtype=torch.float64)
    values[:negative] *= -1
    share = spectral_density(diagonal(values), num_probes=4, steps=30, seed=1).shares().negative
    assert share.low <= negative / 100 <= share.high
    assert (share.high > 0) == (negative > 0)
    assert share.high - share.low < 0.2


def test_nothing_but_zero_and_nodes_that_lie_at_zero():
    zero = spectral_density(operator_of(torch.zeros(4, 4)), num_probes=2, steps=3, seed=0)
    assert zero.shares().zero.value == 1.0
    assert zero.shares().zone == (0.0, 0.0)
    # Two steps end on the two values, of which none is 0, and are one too few for the three.
    for spectrum in ([1.0, -1.0] * 10, [1.0, 0.0, -1.0] * 10):
        operator = operator_of(symmetric(spectrum))
        found = spectral_density(operator, num_probes=3, steps=2, seed=0).shares()
        assert found.negative.low <= spectrum.count(-1.0) / len(spectrum) <= found.negative.high
        assert found.zero.low <= spectrum.count(0.0) / len(spectrum) <= found.zero.high


def test_nodes_by_themselves_are_taken_for_eigenvalues():
    nodes = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    found = SpectralDensity(nodes, weights, 1000, 3).shares()
    assert [found.negative.value, found.zero.value, found.positive.value] == [0.25, 0.5, 0.25]
    assert found.negative.low == pytest.approx(0.25 - 2 * np.sqrt(0.1875 * 2 / 1002), abs=0.005)
    assert found.zone == (-1.0, 2.0)
