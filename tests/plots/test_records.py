"""Reading what runs leave behind, interrupted and old ones included."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from run_dirs import RECORDS, epoch, growth, in_memory, write_run

from hessianflow.plots.records import batch_steps, column, number, read_runs


def test_a_folder_and_an_object_read_the_same(tmp_path):
    folder = write_run(tmp_path / "a", config={"seed": 1}, summary={"updates": 20})
    (from_disk,) = read_runs(folder)
    (from_memory,) = read_runs(in_memory())
    assert from_disk.records == list(from_memory.records) == RECORDS
    assert (from_disk.name, from_memory.name) == ("a", "run 1")
    assert from_disk.config == {"seed": 1}
    assert from_disk.summary == {"updates": 20}
    assert read_runs(str(folder))[0].records == RECORDS


def test_a_half_written_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", tail='{"kind":"epoch","epo')
    assert read_runs(folder)[0].records == RECORDS


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", tail='{"kind":\n{"kind":"epoch"}\n')
    with pytest.raises(
        ValueError, match=r"history.jsonl line 10: it is not JSON: the file is damaged"
    ):
        read_runs(folder)


def test_a_damaged_config_is_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_runs(folder)


def test_rows_without_a_field_count_as_unknown():
    rows = [
        {"kind": "epoch", "lr": None},
        {"kind": "epoch", "lr": 0.5},
        {"kind": "epoch"},
        {"lr": "fast"},
    ]
    np.testing.assert_array_equal(column(rows, "lr"), [math.nan, 0.5, math.nan, math.nan])
    assert math.isnan(number({}, "epoch"))


def test_batch_steps_are_a_staircase_to_the_end():
    (run,) = read_runs(in_memory([*RECORDS, epoch(4, updates=22, batch=512)]))
    examples, sizes = batch_steps(run)
    assert examples.tolist() == [0, 2000, 3000, 4000]
    assert sizes.tolist() == [128, 256, 512, 512]


def test_batch_steps_without_any_row():
    (run,) = read_runs(in_memory([]))
    assert batch_steps(run)[0].tolist() == [0, 0]
    assert math.isnan(run.examples_per_epoch)


def test_batch_steps_of_a_run_cut_short_before_its_first_epoch():
    (run,) = read_runs(in_memory([growth(500, 64, 128)]))
    assert batch_steps(run)[1].tolist() == [64, 128, 128]


def test_names_are_the_shortest_that_tell_runs_apart(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("x/seed0", "y/seed0", "x/other")]
    assert [run.name for run in read_runs(folders)] == ["x/seed0", "y/seed0", "other"]
    assert [run.name for run in read_runs([folders[0], str(folders[0])])] == ["seed0"], (
        "one run, given twice"
    )


def test_a_name_that_needs_the_whole_path_has_one_slash_in_front():
    folders = [SimpleNamespace(records=[], run_dir=path) for path in ("/run", "/elsewhere/run")]
    assert [run.name for run in read_runs(folders)] == ["/run", "elsewhere/run"]


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run directory: it holds no history.jsonl"):
        read_runs(tmp_path)
    with pytest.raises(ValueError, match="runs must name at least one run directory, got none"):
        read_runs([])
