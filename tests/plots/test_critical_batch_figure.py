"""The figure of branches: what is drawn, and where a branch is that has no loss."""

import math

import pytest

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import critical_batch

SIZES = [
    {"batch_size": 32, "excess": 0.0, "stderr": 0.0},
    {"batch_size": 64, "excess": 0.01, "stderr": 0.004},
    {"batch_size": 128, "excess": 0.15, "stderr": 0.02},
]


def test_losses_tolerance_and_critical_batch_are_drawn(tmp_path):
    figure = critical_batch(SIZES, 0.02, 64, tmp_path / "picture.png")
    axes = figure.axes[0]
    line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    assert line.get_xdata().tolist() == [32, 64, 128]
    assert line.get_ydata().tolist() == pytest.approx([0, 1, 15])
    assert axes.get_legend_handles_labels()[1][0] == "critical batch: 64"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64", "128"]
    low, high = axes.get_ylim()
    assert low < -2
    assert high > 19  # the bar of two standard errors
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.parametrize("excess", [None, math.inf, 40.0])
def test_a_branch_that_diverged_is_marked_at_the_top(excess):
    rows = [*SIZES, {"batch_size": 256, "excess": excess, "stderr": 0.0}]
    axes = critical_batch(rows, 0.02, 64).axes[0]
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    mark = handles["far more, or diverged"]
    assert mark.get_xdata().tolist() == [256]
    assert mark.get_ydata()[0] == pytest.approx(19)
    assert axes.get_ylim()[1] < 30


def test_without_sizes_there_is_no_figure():
    with pytest.raises(HessianFlowError, match="at least one batch size"):
        critical_batch([], 0.02, 64)
