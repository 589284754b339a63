"""Figures: the data drawn, labels, marks that do not overlap, files written whole."""

import sys
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from run_dirs import RECORDS, curvature, epoch, growth, in_memory, write_run

from hessianflow.plots import compare, curvature_trajectory, training_curves
from hessianflow.plots.events import MAX_KEY_LINES, cluster, growths, key
from hessianflow.plots.records import read_runs
from hessianflow.plots.style import COLOURS, colour, marker

FIGURES = [curvature_trajectory, training_curves, compare]


def texts(figure):
    """Every text that is drawn: ticks beyond the limits of their axis are not."""
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {
                label
                for t in ticks
                if not low <= t.get_loc() <= high
                for label in (t.label1, t.label2)
            }
    found = figure.findobj(mpl.text.Text)
    return [t for t in found if t.get_text() and t.get_visible() and t not in hidden]


def overlapping(figure):
    """Pairs of drawn texts whose boxes intersect."""
    renderer = figure.canvas.get_renderer()
    boxes = [
        (t.get_text(), t.get_window_extent(renderer))
        for t in texts(figure)
        if t.get_window_extent(renderer).width
    ]
    return [
        (a, b)
        for i, (a, box_a) in enumerate(boxes)
        for b, box_b in boxes[i + 1 :]
        if box_a.shrunk(0.98, 0.8).overlaps(box_b.shrunk(0.98, 0.8))
        and tuple(box_a.bounds) != tuple(box_b.bounds)
    ]


def crowded(changes=60):
    rows = [
        row
        for i in range(1, changes + 1)
        for row in (curvature(i, 100 / i), growth(1000 * i, i, i + 1))
    ]
    return in_memory([*rows, epoch(changes, updates=100, batch=changes)])


@pytest.mark.slow
@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize(
    "runs",
    [
        [in_memory()],
        [in_memory([])],
        [in_memory(), crowded(), in_memory([epoch(1, updates=8, batch=128)])],
    ],
    ids=["one", "empty", "three"],
)
def test_nothing_overlaps_or_leaves_the_picture(draw, runs):
    figure = draw(runs)
    assert isinstance(figure, Figure)
    assert overlapping(figure) == []
    width, height = figure.canvas.get_width_height()
    renderer = figure.canvas.get_renderer()
    for text in texts(figure):
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= height + 1, text


@pytest.mark.parametrize("draw", FIGURES)
def test_png_is_written_and_nothing_else(draw, tmp_path):
    figure = draw(write_run(tmp_path / "run"), path=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "run"]
    assert figure.canvas.manager is None


def test_pyplot_is_not_used():
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_unwritable_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write plot .*absent/f.png: No such file"):
        training_curves(in_memory(), path=tmp_path / "absent" / "f.png")


def test_trajectory_shows_every_kind_of_reading():
    """Records hold 100 (converged), 49 (not converged), -3, and a missing value."""
    figure = curvature_trajectory(in_memory())
    axes, batch_axes = figure.axes
    assert axes.get_yscale() == "log"
    line, converged, unconverged, negative, missing = axes.lines[:5]
    np.testing.assert_array_equal(line.get_ydata(), [100, 49, np.nan, np.nan])
    assert converged.get_ydata().tolist() == [100]
    assert unconverged.get_ydata().tolist() == [49]
    assert negative.get_ydata().tolist() == [3]
    assert missing.get_xdata().tolist() == [4000]
    assert batch_axes.lines[0].get_ydata().tolist() == [128, 256, 512, 512]
    words = [t.get_text() for t in texts(figure)]
    assert "1  128 → 256: eigenvalue fell from 100 to 49" in words
    assert "2  256 → 512: no growth for 10 estimates" in words
    assert {"training examples", "top Hessian eigenvalue", "batch size (examples)"} <= set(words)
    assert {"not converged", "negative: magnitude shown", "zero or not finite"} <= set(words)


def test_trajectory_says_how_batch_normalisation_was_treated():
    """At the axis where all runs agree, beside each run where they do not."""
    one, other = (
        in_memory([{**curvature(1, 5.0), "norm_mode": mode}]) for mode in ("eval", "batch")
    )
    alike = [t.get_text() for t in texts(curvature_trajectory([one, one]))]
    assert "top Hessian eigenvalue (norm mode: eval)" in alike
    mixed = [t.get_text() for t in texts(curvature_trajectory([one, other]))]
    assert "top Hessian eigenvalue" in mixed
    assert [word.split(" (")[1] for word in mixed if "norm mode" in word] == [
        "norm mode: eval)",
        "norm mode: batch)",
    ]


def test_trajectory_names_the_matrix_whose_eigenvalues_it_shows():
    plain, adam = (
        in_memory([curvature(1, 5.0)]),
        in_memory([{**curvature(1, 5.0), "matrix": "preconditioned Hessian"}]),
    )
    alike = [t.get_text() for t in texts(curvature_trajectory([adam, adam]))]
    assert "top preconditioned Hessian eigenvalue" in alike
    mixed = [t.get_text() for t in texts(curvature_trajectory([plain, adam]))]
    assert "top eigenvalue" in mixed
    assert [word.split(" (")[1] for word in mixed if "Hessian" in word] == [
        "Hessian)",
        "preconditioned Hessian)",
    ]


def test_trajectory_of_ordinary_readings_has_no_special_legend():
    words = [
        t.get_text()
        for t in texts(curvature_trajectory(in_memory([curvature(1, 5.0), curvature(2, 4.0)])))
    ]
    assert "not converged" not in words


def test_training_curves_show_percent_and_both_parts():
    figure = training_curves(in_memory())
    accuracy = figure.axes[2]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [40, 60, 70])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [50, 70, 80])
    assert figure.axes[3].lines[0].get_xdata().tolist() == [8, 16, 20]
    assert figure.axes[5].lines[0].get_xdata().tolist() == [0, 2, 3, 4]


def looks(lines):
    return {(line.get_color(), line.get_marker()) for line in lines}


def test_colours_and_markers_tell_28_runs_apart():
    assert len({(colour(i), marker(i)) for i in range(28)}) == 28
    assert len({colour(i) for i in range(14)}) == 14
    assert [colour(i) for i in range(7)] == list(COLOURS)


@pytest.mark.parametrize("draw", FIGURES)
def test_fourteen_runs_look_different_and_as_in_the_legend(draw):
    """Colour and marker alone: dashes say training in one figure and batch size in another."""
    names = {(colour(i), marker(i)) for i in range(14)}
    figure = draw([in_memory() for _ in range(14)])
    legend = [line for line in figure.legends[0].get_lines() if line.get_label().startswith("run ")]
    assert len(legend) == 14
    assert looks(legend) == names
    assert {line.get_linestyle() for line in legend} == {"-"}
    for axes in figure.axes:
        drawn = [
            line
            for line in axes.lines
            if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) > 1
        ]
        # the readings on the line are its marks
        if draw is curvature_trajectory and axes is figure.axes[0]:
            marks = [
                line
                for line in axes.lines
                if line.get_linestyle() == "None" and line.get_marker() not in "vx"
            ]
            assert looks(marks) == {(shade, mark or "o") for shade, mark in names}
        else:
            assert {(shade, mark.strip(".")) for shade, mark in looks(drawn)} >= names


def test_marks_stand_where_something_is_drawn():
    """Evaluated in every third epoch only, or never."""
    rows = [
        epoch(i, updates=i, batch=8, **({} if i % 3 == 0 else {"eval_accuracy": None}))
        for i in range(1, 61)
    ]
    never = [row | {"eval_accuracy": None} for row in rows]
    figure = compare([in_memory(rows)] * 8 + [in_memory(never)])
    line = figure.axes[0].lines[2 * 7]
    marked = line.get_markevery()
    assert 8 <= len(marked) <= 16
    assert np.isfinite(line.get_ydata()[marked]).all()
    figure.canvas.draw()


def test_compare_counts_seconds_from_the_start():
    figure = compare(in_memory())
    assert figure.axes[1].lines[0].get_xdata().tolist() == [10, 20, 30]


@pytest.mark.parametrize("positions", [[0.0] * 50, list(range(0, 600, 3)), [0, 100, 101, 300]])
def test_clusters_cover_every_event_in_order_and_do_not_touch(positions):
    groups = cluster(positions)
    assert [i for first, last in groups for i in range(first, last + 1)] == list(
        range(len(positions))
    )
    centres = [(positions[a] + positions[b]) / 2 for a, b in groups]
    assert all(b - a > 10 for a, b in pairwise(centres))


def test_key_counts_what_does_not_fit():
    (run,) = read_runs(crowded(60))
    lines = key(growths(run, "black"))
    assert len(lines) == MAX_KEY_LINES
    assert lines[-1][0] == f"… and {60 - MAX_KEY_LINES + 1} more, listed in history.jsonl"


def test_long_reasons_are_cut_and_unchanged_sizes_are_no_event():
    rows = [growth(10, 64, 64), growth(20, 64, 128, "because " * 30), growth(30, 128, 256, "")]
    (run,) = read_runs(in_memory(rows))
    long, empty = growths(run, "black")
    assert long.text.endswith("…")
    assert len(long.text) < 90
    assert empty.text == "128 → 256: no reason recorded"


def test_records_are_not_changed():
    before = [dict(row) for row in RECORDS]
    for draw in FIGURES:
        draw(in_memory())
    assert before == RECORDS
