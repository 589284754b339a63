"""The figure of the share of the edge in use draws what readings hold, and refuses to draw none."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hessianflow import HessianFlowError
from hessianflow.plots import edge_share, has_edge_share


@dataclass
class Rows:
    """A run in memory."""

    records: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)


def run(*shares: float | None) -> Rows:
    """Return a run of epochs of 100 examples, each with a reading of such a share."""
    rows: list[dict[str, Any]] = []
    for epoch, share in enumerate(shares, start=1):
        at = {"epoch": epoch, "examples": 100 * epoch}
        rows += [{"kind": "curvature", **at, "edge_share": share}, {"kind": "epoch", **at}]
    return Rows(rows, {"trainer": {"optimizer": "Adam"}})


def test_positive_shares_are_drawn_over_epochs_with_the_edge_at_1() -> None:
    figure = edge_share([run(0.5, float("nan"), 1.5, -0.2, 0.0, None), run(0.1)])
    [axes] = figure.axes
    first, second, edge = axes.lines
    np.testing.assert_array_equal(first.get_xdata(), [1.0, 3.0])
    np.testing.assert_array_equal(first.get_ydata(), [0.5, 1.5])
    np.testing.assert_array_equal(second.get_ydata(), [0.1])
    assert second.get_marker() == "o"  # else a single reading would not be seen
    assert list(np.asarray(edge.get_ydata())) == [1.0, 1.0]
    assert axes.get_yscale() == "log"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["run 1 (Adam)", "run 2 (Adam)", "edge"]


def test_without_a_share_there_is_nothing_to_draw() -> None:
    readings = Rows([{"kind": "curvature", "epoch": 1, "examples": 100, "eigenvalue": 2.0}])
    assert not has_edge_share([readings])
    assert has_edge_share([readings, run(0.3)])
    with pytest.raises(HessianFlowError, match="no reading of run 1 holds a share of the edge"):
        edge_share(readings)
