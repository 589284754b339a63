"""Figures of runs on a parameter server and of runs whose resolution changes: what is drawn
where."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from run_dirs import epoch, growth, in_memory, write_run

from hessianflow.interfaces import HessianFlowError
from hessianflow.plots import accuracy_over_time, batch_and_resolution, commit_timeline
from hessianflow.plots.dual_batch import LARGE, SMALL, WAITING
from hessianflow.plots.grouping import flatten


def commit(number, worker, started, finished, *, batch=10):
    place = {
        "kind": "commit",
        "epoch": (number + 1) // 2,
        "examples": 100 * number,
        "updates": number,
    }
    return {
        **place,
        "commits": number,
        "worker": worker,
        "started": started,
        "finished": finished,
        "batch_size": batch,
    }


COMMITS = [
    commit(1, 0, 0.0, 2.0),
    commit(2, 1, 0.0, 3.0, batch=20),
    epoch(
        1, updates=2, batch=20, accuracy=0.4, clock_seconds=3.0, small_batch_size=10, resolution=24
    ),
    commit(3, 0, 3.0, 5.0),
    commit(3, 0, 3.5, 5.5),  # made again after the server had died
    commit(4, 1, 3.0, 6.0, batch=20),
    epoch(
        2, updates=4, batch=20, accuracy=0.6, clock_seconds=6.0, small_batch_size=10, resolution=32
    ),
]
PLAN = {"plans": {"32": {"workers": [{"small": True}, {"small": False}]}}}


def test_the_timeline_has_a_bar_for_every_local_epoch(tmp_path):
    figure = commit_timeline(
        write_run(tmp_path / "run", COMMITS, config={"dual_batch": PLAN}), tmp_path / "t.png"
    )
    [axes] = figure.axes
    bars = {
        (round(p.get_y() + 0.3), p.get_x(), p.get_width(), to_hex(p.get_facecolor()))
        for p in axes.patches
    }
    small, large, waiting = (to_hex(colour) for colour in (SMALL, LARGE, WAITING))
    assert bars == {
        (0, 0.0, 2.0, small),
        (0, 2.0, 1.5, waiting),
        (0, 3.5, 2.0, small),
        (1, 0.0, 3.0, large),
        (1, 3.0, 3.0, large),
    }
    assert axes.get_title(loc="left") == "first 2 of 2 epochs; a bar ends with a push"
    assert (tmp_path / "t.png").stat().st_size > 0
    [axes] = commit_timeline(in_memory(COMMITS), epochs=1).axes
    assert len(axes.patches) == 2


def test_accuracy_over_both_clocks(tmp_path):
    left, right = accuracy_over_time([in_memory(COMMITS)], tmp_path / "a.png").axes
    assert np.array_equal(left.lines[0].get_xdata(), [3.0, 6.0])
    assert np.array_equal(right.lines[0].get_xdata(), [10.0, 20.0])
    assert left.lines[0].get_ydata() == pytest.approx([40, 60])


def test_both_batches_and_the_resolution_by_epoch(tmp_path):
    top, bottom = batch_and_resolution(in_memory(COMMITS), tmp_path / "b.png").axes
    assert [list(line.get_ydata()) for line in top.lines] == [[20, 20, 20], [10, 10, 10]]
    assert np.array_equal(bottom.lines[0].get_xdata(), [0, 1, 2])
    assert list(bottom.lines[0].get_ydata()) == [24, 32, 32]


def test_the_batch_of_any_run_with_stages(tmp_path):
    stages = [
        {"start": s, "end": s + 1, "level": {"resolution": r}}
        for s, r in ((0, 12), (1, 16), (2, 12))
    ]
    records = [
        epoch(1, updates=8, batch=128),
        growth(1000, 128, 256),
        epoch(2, updates=12, batch=256),
    ]
    run = write_run(tmp_path / "run", records, config={"resolution_stages": stages})
    top, bottom = batch_and_resolution(run).axes
    assert list(top.lines[0].get_ydata()) == [128, 256, 256]
    assert list(top.lines[0].get_xdata()) == [0, 1, 2]
    assert list(bottom.lines[0].get_ydata()) == [12, 16, 16], "the third stage was never reached"


def test_what_follows_from_other_settings_does_not_tell_runs_apart():
    config = {
        "settings": {"epochs": 2},
        "dual_batch": {"times": {"32": {"slope": 0.1}}},
        "resolution_stages": [1],
    }
    assert flatten(config) == {"settings.epochs": 2}


def test_runs_without_either_are_refused():
    with pytest.raises(HessianFlowError, match="run 1 holds no commit: it had no parameter server"):
        commit_timeline(in_memory([epoch(1, updates=1, batch=1)]))
    with pytest.raises(HessianFlowError, match="run 1 records no resolution"):
        batch_and_resolution(in_memory([epoch(1, updates=1, batch=1)]))
