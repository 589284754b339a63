"""Broadening against its integral and a closed form; shapes and labels of the picture."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hessianflow.plots import spectral_density
from hessianflow.plots.spectra import broaden


def quadrature(nodes, weights):
    return SimpleNamespace(nodes=nodes, weights=weights)


TWO_PROBES = quadrature(
    torch.tensor([[0.0, 10.0], [1.0, 9.0]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]])
)


def test_one_node_is_a_gaussian():
    grid = np.linspace(-3, 3, 7)
    mean, error = broaden(np.array([[0.0]]), np.array([[1.0]]), grid, 1.0)
    np.testing.assert_allclose(mean, np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), rtol=1e-14)
    assert not error.any()


def test_density_integrates_to_one_and_error_is_that_of_the_mean():
    """Rectangle rule on a fine grid; the two probes' densities differ by d, so the standard error
    is |d|/2."""
    nodes, weights = TWO_PROBES.nodes.double().numpy(), TWO_PROBES.weights.double().numpy()
    grid = np.linspace(-10, 20, 20001)
    mean, error = broaden(nodes, weights, grid, 0.5)
    assert mean.sum() * (grid[1] - grid[0]) == pytest.approx(weights.sum() / 2, abs=1e-6)
    first, second = (broaden(nodes[i : i + 1], weights[i : i + 1], grid, 0.5)[0] for i in (0, 1))
    np.testing.assert_allclose(error, np.abs(first - second) / 2, atol=1e-15)


def test_figure_has_a_logarithmic_axis_and_a_band():
    (axes,) = spectral_density(TWO_PROBES).axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "eigenvalue"
    assert len(axes.collections) == 1
    assert "2 probes" in axes.get_title(loc="left")
    assert "standard error" in axes.get_title(loc="left")


def test_several_spectra_share_a_legend(tmp_path):
    one_probe = quadrature([[3.0]], [[1.0]])
    figure = spectral_density(
        {"start": TWO_PROBES, "end": one_probe}, tmp_path / "s.png", sigma=0.3
    )
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["start", "end"]
    assert (tmp_path / "s.png").stat().st_size > 0
    assert "1 to 2 probes" in figure.axes[0].get_title(loc="left")


def test_a_spectrum_of_one_point_is_drawn():
    (axes,) = spectral_density(quadrature([[0.0, 0.0]], [[0.5, 0.5]])).axes
    assert np.isfinite(axes.lines[0].get_ydata()).all()


@pytest.mark.parametrize(
    ("density", "sigma", "message"),
    [
        (
            quadrature([[1.0]], [[1.0, 2.0]]),
            None,
            r"shape \[num_probes, steps\], got \(1, 1\) and \(1, 2\)",
        ),
        (quadrature([1.0], [1.0]), None, "must both have shape"),
        (quadrature([[math.nan]], [[1.0]]), None, "nodes and weights must be finite"),
        (TWO_PROBES, 0.0, "sigma must be positive and finite, got 0.0"),
        ({}, None, "density must hold at least one spectrum"),
    ],
)
def test_bad_input_is_named(density, sigma, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(density, sigma=sigma)
