"""The comparison table against means and spreads worked by hand."""

import csv
import io
import math

import pytest
from run_dirs import epoch, in_memory, write_run

from hessianflow.plots import compare_table
from hessianflow.plots.records import read_runs
from hessianflow.plots.settings import flatten, group_runs, seed_of


@pytest.fixture
def folders(tmp_path):
    def run(name, seed, accuracy, updates, controller):
        config = {"seed": seed, "controller": controller, "lr": 0.1, "run_dir": name, "environment": {"host": name}}
        summary = {
            "status": "finished",
            "final_accuracy": accuracy,
            "updates": updates,
            "examples": 3000,
            "wall_seconds": 30.0 + seed,
            "peak_memory_mib": 100.0 + seed,
            "largest_batch": 512,
        }
        return write_run(tmp_path / name, config=config, summary=summary)

    return [
        run("a0", 0, 0.60, 10, "absa"),
        run("f0", 0, 0.70, 40, "fixed"),
        run("a1", 1, 0.62, 14, "absa"),
        write_run(tmp_path / "loose", [epoch(1, updates=8, batch=128, accuracy=0.5)]),
    ]


def test_mean_and_spread_over_seeds(folders):
    """absa: mean of .60 and .62 is .61, sample standard deviation .02/sqrt(2)."""
    absa, fixed, loose = compare_table(folders).rows
    assert (absa.settings, fixed.settings, loose.settings) == (
        "controller=absa, lr=0.1",
        "controller=fixed, lr=0.1",
        "loose",
    )
    assert (absa.runs, absa.finished, absa.updates, absa.seconds, absa.peak_memory_mib) == (2, 2, 12, 30.5, 101)
    assert absa.accuracy == pytest.approx(0.61)
    assert absa.accuracy_std == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(fixed.accuracy_std)


def test_an_unfinished_run_counts_with_its_last_epoch(folders):
    loose = compare_table(folders).rows[2]
    assert (loose.accuracy, loose.updates, loose.examples, loose.seconds, loose.finished) == (0.5, 8, 1000, 10.0, 0)
    assert math.isnan(loose.peak_memory_mib)


def test_markdown(folders):
    lines = compare_table(folders).to_markdown().splitlines()
    assert lines[2] == "| controller=absa, lr=0.1 | 2 | 61.00 ± 1.41 | 12 | 3000 | 30.5 | 101 | 512 |"
    assert lines[4] == "| loose (1 unfinished) | 1 | 50.00 | 8 | 1000 | 10.0 | - | 128 |"
    assert len({line.count("|") for line in lines}) == 1


def test_csv_reads_back(folders):
    rows = list(csv.DictReader(io.StringIO(compare_table(folders).to_csv())))
    assert [row["settings"] for row in rows][1] == "controller=fixed, lr=0.1"
    assert float(rows[0]["accuracy"]) == pytest.approx(0.61)
    assert rows[1]["accuracy_std"] == ""


def test_runs_without_anything_recorded():
    (row,) = compare_table(in_memory([])).rows
    assert math.isnan(row.accuracy)
    assert math.isnan(row.seconds)
    assert compare_table(in_memory([])).to_markdown().count("| - ") == 6


def test_settings_that_say_where_and_when_do_not_part_groups():
    flat = flatten({"seed": 1, "lr": 0.1, "trainer": {"epochs": 3, "run_dir": "x"}, "environment": {"python": "3"}})
    assert flat == {"lr": 0.1, "trainer.epochs": 3}


def test_seed_is_found_where_it_stands():
    assert seed_of({"settings": {"lr": 0.1, "seed": 4}, "trainer": {}}) == 4
    assert seed_of({"seed": 0}) == 0
    assert seed_of({"settings": {}}) is None


def test_labels_cut_short_stay_distinct(tmp_path):
    configs = [{f"s{i}": 0 for i in range(6)}, {f"s{i}": 1 for i in range(5)} | {"s5": 1}]
    configs.append(configs[0] | {"s5": 2})
    folders = [write_run(tmp_path / f"r{i}", config=config) for i, config in enumerate(configs)]
    labels = [group.label for group in group_runs(read_runs(folders))]
    assert len(set(labels)) == 3
    assert labels[0] == "s0=0, s1=0, s2=0, s3=0, +2 more (r0)"
