"""Figures in the user's axes, in notebooks, and redrawn during a run."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hessianflow import plots
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import History, Recorder

DRAWS = sorted(
    name
    for name, function in vars(plots).items()
    if inspect.isfunction(function) and inspect.signature(function).return_annotation is Figure
)


def history() -> History:
    records: list[dict[str, Any]] = []
    for epoch in (1, 2):
        place = {"epoch": epoch, "examples": 100 * epoch, "updates": 10 * epoch}
        reading = {"eigenvalue": 3.0, "edge_share": 0.4, "converged": True}
        records.append({"kind": "curvature", **place, **reading})
        change = {"from": 8 * epoch, "to": 16 * epoch, "lr_factor": 1.0, "reason": "fell"}
        records.append({"kind": "batch", **place, **change})
        figures = {"batch_size": 8, "lr": 0.1, "train_loss": 0.5, "eval_loss": 0.4}
        more = {"eval_accuracy": 0.5, "seconds": 1.0, "resolution": 8, "clock_seconds": 1.0}
        records.append({"kind": "epoch", **place, **figures, **more})
        commit = {"commits": epoch, "worker": 0, "started": epoch - 1.0, "finished": epoch}
        records.append({"kind": "commit", **place, **commit})
        event = {"event": "joined", "message": "", "elapsed": 1.0 * epoch, "workers": epoch}
        records.append({"kind": "event", **place, **event})
    return History(records, {"trainer": {"examples_per_epoch": 100}})


PLAN = {
    "predictions": [
        {"workers": n, "seconds": 10 / n, "efficiency": 1.0, "communication": 0.1} for n in (1, 2)
    ]
}
DENSITY = SimpleNamespace(nodes=np.array([[0.0, 1.0]]), weights=np.array([[0.5, 0.5]]))
SIZE = {"batch_size": 8, "excess": 0.0, "stderr": 0.01}
CALLS: dict[str, tuple[Any, int]] = {
    "accuracy_over_time": ((history(),), 2),
    "batch_and_resolution": ((history(),), 2),
    "commit_timeline": ((history(),), 1),
    "compare": ((history(),), 2),
    "critical_batch": (([SIZE], 0.01, 8), 1),
    "curvature_trajectory": ((history(),), 1),
    "edge_share": ((history(),), 1),
    "landscape": (([0.0, 1.0], [1.0, 2.0]), 1),
    "robustness": (([0.0, 0.1], {"fgsm": [(0.9, 0.8, 1.0), (0.5, 0.4, 0.6)]}), 1),
    "scaling": ((PLAN,), 2),
    "spectral_density": ((DENSITY,), 1),
    "training_curves": ((history(),), 6),
    "workers": ((history(),), 3),
}


def test_every_figure_is_called_here() -> None:
    assert sorted(CALLS) == DRAWS


@pytest.mark.parametrize("name", DRAWS)
def test_a_figure_is_drawn_only_into_the_axes_of_the_user(name: str, tmp_path: Path) -> None:
    arguments, number = CALLS[name]
    function = getattr(plots, name)
    own = Figure()
    axes = own.subplots(1, number + 1, squeeze=False)[0]
    option: dict[str, Any] = {"ax": axes[0]} if number == 1 else {"axes": axes[:number]}
    figure = function(*arguments, path=tmp_path / "own.png", **option)
    assert figure is own
    assert (tmp_path / "own.png").is_file()
    assert all(each.has_data() or each.get_xlabel() or each.get_ylabel() for each in axes[:number])
    assert not axes[number].has_data()
    assert not own.legends
    assert function(*arguments)._repr_png_().startswith(b"\x89PNG")


def test_a_wrong_number_of_axes_is_named() -> None:
    pattern = "this figure needs 6 axes, got 2: pass the axes of matplotlib.pyplot.subplots"
    with pytest.raises(HessianFlowError, match=pattern):
        plots.training_curves(history(), axes=Figure().subplots(1, 2))


def test_a_run_is_drawn_after_every_epoch(tmp_path: Path) -> None:
    path = tmp_path / "live.png"
    drawn: list[int] = []

    def draw(run: History, target: Any) -> Figure:
        drawn.append(len(run.records))
        return plots.training_curves(run, target)

    sink = plots.live(path, draw=draw)
    recorder = Recorder(None, [sink])
    recorder.start({"trainer": {"examples_per_epoch": 100}})
    for record in history().records:
        recorder.write(record)
        assert path.is_file() == bool(drawn)
    recorder.close()
    assert drawn == [3, 8, 10]
    assert sink.figure is not None
