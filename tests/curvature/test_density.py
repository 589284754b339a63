"""Spectral density: exact quadrature where theory says so, and distances to a known spectrum
elsewhere."""

import pytest
import torch
from problems import clustered, operator_of, symmetric
from scipy.stats import wasserstein_distance

from hessianflow.curvature import CallableOperator, NonFiniteError, spectral_density
from hessianflow.curvature.density import SpectralDensity
from hessianflow.interfaces import HessianFlowError

SPECTRUM = clustered(80)
MATRIX = symmetric(SPECTRUM)


def test_moments_are_exact_for_the_start_vector():
    """Gauss quadrature with m nodes integrates polynomials up to degree 2m - 1: v^T A^p v, with the
    same v."""
    from hessianflow.curvature.vectors import gaussian, generator

    operator = operator_of(MATRIX)
    found = spectral_density(operator, num_probes=1, steps=5, seed=7)
    start = gaussian(operator, generator(7, operator.device))
    start = start / start.norm()
    vector = start
    for power in range(10):
        assert float((found.weights[0] * found.nodes[0] ** power).sum()) == pytest.approx(
            float(start @ vector), rel=1e-9
        )
        vector = MATRIX @ vector


def test_weights_are_shares_and_shapes_are_as_stated():
    found = spectral_density(operator_of(MATRIX), num_probes=3, steps=12, seed=0)
    assert found.nodes.shape == found.weights.shape == (3, 12)
    assert found.matvecs == 36
    assert (found.weights >= 0).all()
    assert found.weights.sum(dim=1) == pytest.approx([1.0] * 3)
    assert (found.nodes.diff(dim=1) >= 0).all()


def test_close_to_the_exact_distribution_and_closer_with_more_probes():
    few, many = (
        spectral_density(operator_of(MATRIX), num_probes=n, steps=30, seed=0) for n in (1, 30)
    )
    distance = [
        wasserstein_distance(d.nodes.flatten(), SPECTRUM, d.weights.flatten()) for d in (few, many)
    ]
    assert distance[1] < distance[0]
    # The mass of one eigenvalue of 80 varies as 1/80 sqrt(2/30) over 30 probes, and the top one
    # moves it by 10.
    assert distance[1] < 4 * 10 / 80 * (2 / 30) ** 0.5


def test_no_copies_of_the_top_eigenvalue_after_many_steps():
    found = spectral_density(
        operator_of(symmetric([100.0, *torch.linspace(0, 1, 199).tolist()])),
        num_probes=1,
        steps=150,
        seed=0,
    )
    assert int((found.nodes > 50).sum()) == 1


def test_breakdown_ends_early_and_exactly():
    matrix = symmetric([2.0] * 10 + [-1.0] * 30)
    found = spectral_density(operator_of(matrix), num_probes=2, steps=20, seed=0)
    assert found.matvecs == 4
    assert found.nodes.unique().tolist() == pytest.approx(
        [-1.0, -1.0, 2.0, 2.0], abs=1e-9
    ) or found.nodes.shape == (
        2,
        2,
    )
    zero = spectral_density(operator_of(torch.zeros(4, 4)), num_probes=1, steps=3, seed=0)
    assert zero.nodes.tolist() == [[0.0]]


def test_rows_of_unequal_length_are_padded_without_weight():
    first = iter([True])

    def product(vector):  # the identity at first, where the first start breaks down at once
        return vector if next(first, False) else MATRIX @ vector

    operator = CallableOperator(product, len(MATRIX), MATRIX.dtype)
    found = spectral_density(operator, num_probes=2, steps=3, seed=0)
    assert found.nodes[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert found.weights[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert found.matvecs == 4
    assert bool((found.weights[1] > 0).all())


def test_negative_mass_within_its_standard_error():
    found = spectral_density(operator_of(MATRIX), num_probes=40, steps=40, seed=0)
    truth = sum(v < 0 for v in SPECTRUM) / len(SPECTRUM)
    mass = found.mass_below(0.0)
    assert abs(mass.value - truth) < 2 * mass.stderr
    assert mass.stderr < 0.1
    single = spectral_density(operator_of(MATRIX), num_probes=1, steps=5, seed=0).mass_below()
    assert abs(single.value - truth) < 2 * single.stderr
    assert len(single.samples) == 1


def test_smoothed_density_integrates_to_one_and_shows_the_spread():
    smooth = spectral_density(operator_of(MATRIX), num_probes=4, steps=20, seed=0).smoothed(2000)
    assert float(torch.trapezoid(smooth.density, smooth.grid)) == pytest.approx(1.0, abs=1e-3)
    assert smooth.spread.shape == smooth.grid.shape == (2000,)
    assert smooth.spread.max() > 0


def test_smoothing_is_the_stated_gaussian():
    single = SpectralDensity(
        torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[0.25, 0.75]]).double(), 4, 2
    )
    smooth = single.smoothed(3, width=0.5, limits=(1.0, 3.0))
    normal = torch.distributions.Normal(0.0, 0.5)
    expected = [
        0.25 * normal.log_prob(torch.tensor(a)).exp()
        + 0.75 * normal.log_prob(torch.tensor(b)).exp()
        for a, b in ((0.0, 2.0), (1.0, 1.0), (2.0, 0.0))
    ]
    assert smooth.density.tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)
    assert smooth.spread.isnan().all()
    assert single.moment(2) == pytest.approx(0.25 + 0.75 * 9)


def test_bad_arguments_are_refused():
    operator = operator_of(MATRIX)
    with pytest.raises(
        HessianFlowError, match="num_probes and steps must be at least 1, got 0 and 5"
    ):
        spectral_density(operator, num_probes=0, steps=5)
    with pytest.raises(NonFiniteError, match="is not finite"):
        spectral_density(CallableOperator(lambda v: v * float("inf"), 4), num_probes=1, steps=2)
    with pytest.raises(
        HessianFlowError, match="points must be at least 2 and width positive, got 1 and None"
    ):
        spectral_density(operator, num_probes=1, steps=2, seed=0).smoothed(1)


def test_nodes_of_a_tiny_float32_matrix():
    """Squares of its entries are 0 in float32: a norm of 0 would pass for a breakdown after one
    step."""
    matrix = symmetric([3.0, 2.0, 1.0])
    found = spectral_density(operator_of((1e-25 * matrix).float()), num_probes=1, steps=3, seed=0)
    assert (1e25 * found.nodes[0]) == pytest.approx([1.0, 2.0, 3.0], rel=1e-4)
