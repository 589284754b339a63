import pytest
from test_figures import overlapping

from hessianflow.plots import scaling


def plan(workers=(1, 2, 4, 1024)):
    rows = [
        {"workers": w, "seconds": 7200 / w + w, "efficiency": 1 / w, "communication": 1 - 1 / w}
        for w in workers
    ]
    text = "0.7 ms + 0.2 ms an example: measured here on a processor with a long name, " * 3
    return {
        "predictions": rows,
        "sources": {"step": text, "bandwidth": "1 GB/s: as given", "left out": "much"},
    }


@pytest.mark.parametrize("workers", [(1,), (1, 2, 4, 1024), tuple(range(1, 40))])
def test_time_against_perfect_scaling_and_shares(workers, tmp_path):
    figure = scaling(plan(workers), tmp_path / "plan.png")
    assert overlapping(figure) == []
    assert (tmp_path / "plan.png").stat().st_size > 5000
    perfect, times = figure.axes[0].lines
    assert times.get_ydata()[0] == pytest.approx(7201 / 3600)  # hours
    assert perfect.get_ydata()[-1] == pytest.approx(7201 / 3600 / workers[-1])
    assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([100 / w for w in workers])
    assert "as given" in figure.get_suptitle()
    assert "much" not in figure.get_suptitle()


def test_nothing_predicted():
    with pytest.raises(ValueError, match="plan must hold at least one prediction, got none"):
        scaling({"predictions": []})
