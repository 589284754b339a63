"""Curves and contours of given losses."""

import numpy as np
import pytest

from hessianflow.plots import landscape

STEPS = np.linspace(-1, 1, 9)
BOWL = STEPS[:, None] ** 2 + 3 * STEPS[None, :] ** 2 + 0.01


def test_curve_leaves_out_what_is_not_finite(tmp_path):
    losses = STEPS**2
    losses[0] = np.inf
    (axes,) = landscape(STEPS, losses, path=tmp_path / "l.png").axes
    assert np.isnan(axes.lines[0].get_ydata()[0])
    assert axes.get_ylabel() == "loss"
    assert (tmp_path / "l.png").exists()


@pytest.mark.parametrize(
    "losses",
    [BOWL, BOWL + 10, np.full_like(BOWL, 2.0), BOWL - 1],
    ids=["log", "linear", "flat", "neg"],
)
def test_contours_of_any_range(losses):
    figure = landscape(STEPS, losses, STEPS)
    axes, bar = figure.axes
    figure.canvas.draw()
    assert axes.get_xlabel() == "step along direction 1"
    assert bar.get_ylabel() == "loss"


def test_contours_are_drawn_the_right_way_round():
    """The loss rises faster along the second direction, so the innermost region is wider than it is
    high."""
    filled = landscape(STEPS, BOWL, STEPS).axes[0].collections[0]
    inner = filled.get_paths()[0].get_extents()
    assert inner.width > 1.3 * inner.height


def test_directions_of_different_length():
    figure = landscape(STEPS, BOWL[:, 2:8], STEPS[2:8])
    assert figure.axes[0].get_ylim() == (STEPS[2], STEPS[7])


def test_large_spans_get_a_logarithmic_axis():
    assert landscape(STEPS, 0.01 + STEPS**2).axes[0].get_yscale() == "log"
    assert landscape(STEPS, 1 + STEPS**2).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (STEPS, STEPS[:3]),
            r"losses must have shape \(9,\) with at least 2 points a side, got \(3,\)",
        ),
        ((STEPS, BOWL, STEPS[:4]), r"losses must have shape \(9, 4\)"),
        ((STEPS[:1], STEPS[:1]), "at least 2 points a side"),
        ((STEPS, np.full(9, np.nan)), "losses must hold at least one finite value"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        landscape(*arguments)
