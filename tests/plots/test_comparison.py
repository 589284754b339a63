"""The comparison table against means and spreads worked by hand."""

import csv
import io
import math

import pytest
from run_dirs import epoch, growth, in_memory, write_run

from hessianflow.plots import compare, compare_table
from hessianflow.plots.grouping import flatten, group_runs, seed_of
from hessianflow.plots.records import read_runs


@pytest.fixture
def folders(tmp_path):
    def run(name, seed, accuracy, updates, controller):
        config = {
            "seed": seed,
            "controller": controller,
            "lr": 0.1,
            "run_dir": name,
            "environment": {"host": name},
        }
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
        "controller=absa",
        "controller=fixed",
        "loose",
    )
    assert (absa.runs, absa.finished, absa.updates, absa.seconds, absa.peak_memory_mib) == (
        2,
        2,
        12,
        30.5,
        101,
    )
    assert absa.accuracy == pytest.approx(0.61)
    assert absa.accuracy_std == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(fixed.accuracy_std)


def test_an_unfinished_run_counts_with_its_last_epoch(folders):
    loose = compare_table(folders).rows[2]
    assert (loose.accuracy, loose.updates, loose.examples, loose.seconds, loose.finished) == (
        0.5,
        8,
        1000,
        10.0,
        0,
    )
    assert math.isnan(loose.peak_memory_mib)


def test_an_unfinished_run_and_a_second_one_of_a_seed_belong_to_no_mean(folders, tmp_path):
    """The mean is that of seeds 0 and 1 as before; the others stand below it, each with its own
    figures."""
    config = {"seed": 1, "controller": "absa", "lr": 0.1}
    again = {"status": "finished", "final_accuracy": 0.9, "updates": 99}
    folders.append(
        write_run(tmp_path / "killed", [epoch(1, updates=7, batch=64, accuracy=0.1)], config=config)
    )
    folders.append(write_run(tmp_path / "again", config=config, summary=again))
    table = compare_table(folders)
    assert [(row.settings, row.runs, row.updates, row.finished) for row in table.rows][:3] == [
        ("controller=absa", 2, 12, 2),
        ("controller=absa (killed: unfinished)", 1, 7, 0),
        ("controller=absa (again: seed 1 again)", 1, 99, 1),
    ]
    assert table.rows[0].accuracy == pytest.approx(0.61)
    assert "| controller=absa (killed: unfinished) | 1 | 10.00 | 7 |" in table.to_markdown()


def test_two_unfinished_runs_are_not_averaged(tmp_path):
    config = {"seed": 0, "lr": 0.1}
    runs = [
        write_run(tmp_path / n, [epoch(1, updates=u, batch=8)], config=config)
        for n, u in (("a", 5), ("b", 9))
    ]
    rows = compare_table(runs).rows
    assert [(row.settings, row.updates) for row in rows] == [
        ("a (a: unfinished)", 5),
        ("a (b: unfinished)", 9),
    ]


def test_runs_without_a_seed_are_averaged(tmp_path):
    """As runs made from Python are, which tell no seed."""
    ended = {"status": "finished", "updates": 4, "final_accuracy": 0.5}
    runs = [write_run(tmp_path / name, config={"lr": 0.1}, summary=ended) for name in ("a", "b")]
    assert [row.runs for row in compare_table(runs).rows] == [2]


def test_markdown(folders):
    lines = compare_table(folders).to_markdown().splitlines()
    assert lines[2] == "| controller=absa | 2 | 61.00 ± 1.41 | 12 | 3000 | 30.5 | 101 | 512 |"
    assert lines[4] == "| loose (1 unfinished) | 1 | 50.00 | 8 | 1000 | 10.0 | - | 128 |"
    assert len({line.count("|") for line in lines}) == 1


def test_csv_reads_back(folders):
    rows = list(csv.DictReader(io.StringIO(compare_table(folders).to_csv())))
    assert [row["settings"] for row in rows][1] == "controller=fixed"
    assert float(rows[0]["accuracy"]) == pytest.approx(0.61)
    assert rows[1]["accuracy_std"] == ""


def test_runs_without_anything_recorded():
    (row,) = compare_table(in_memory([])).rows
    assert math.isnan(row.accuracy)
    assert math.isnan(row.seconds)
    assert compare_table(in_memory([])).to_markdown().count("| - ") == 6


def test_settings_that_say_where_and_when_do_not_part_groups():
    flat = flatten(
        {
            "seed": 1,
            "lr": 0.1,
            "trainer": {"epochs": 3, "run_dir": "x"},
            "environment": {"python": "3"},
        }
    )
    assert flat == {"lr": 0.1, "trainer.epochs": 3}


def test_seed_is_found_where_it_stands():
    assert seed_of({"settings": {"lr": 0.1, "seed": 4}, "trainer": {}}) == 4
    assert seed_of({"seed": 0}) == 0
    assert seed_of({"settings": {}}) is None


def labels(tmp_path, *configs):
    folders = [write_run(tmp_path / f"r{i}", config=config) for i, config in enumerate(configs)]
    return [group.label for group in group_runs(read_runs(folders))]


def test_a_label_holds_the_fewest_settings_that_tell_groups_apart(tmp_path):
    """The second differs in all six, but the last setting is enough for all three."""
    configs = [{f"s{i}": 0 for i in range(6)}, {f"s{i}": 1 for i in range(5)} | {"s5": 1}]
    assert labels(tmp_path, *configs, configs[0] | {"s5": 2}) == ["s5=0", "s5=1", "s5=2"]


def test_a_label_holds_what_a_user_sets_before_what_follows_from_it(tmp_path):
    """As config.json has them: the controller sets schedule and norm mode, and the trainer tells
    its class."""

    def config(controller, lr, **more):
        given = {
            "schedule": f"of {controller}",
            "norm_mode": f"of {controller}",
            "controller": controller,
            "lr": lr,
        }
        return {
            "settings": given | more,
            "trainer": {"controller": controller.upper(), "key": f"{controller}{lr}"},
        }

    one = labels(tmp_path / "one", config("absa", 0.1), config("fixed", 0.1), config("cabs", 0.1))
    assert one == ["controller=absa", "controller=fixed", "controller=cabs"]
    grid = labels(
        tmp_path / "two", *(config(c, lr) for c in ("absa", "fixed") for lr in (0.1, 0.2))
    )
    assert grid == [f"controller={c}, lr={lr}" for c in ("absa", "fixed") for lr in (0.1, 0.2)]
    odd = labels(tmp_path / "odd", config("absa", 0.1), config("absa", 0.1, probe_examples=8))
    assert odd == ["r0", "probe_examples=8"]
    none = labels(
        tmp_path / "none", *(config("absa", 0.1, microbatch_size=size) for size in (None, 8))
    )
    assert none == ["microbatch_size=default", "microbatch_size=8"]


def test_the_same_run_twice_counts_once(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (row,) = compare_table([folders[0], "a0", tmp_path / "f0" / ".." / "a0"]).rows
    assert (row.settings, row.runs) == ("a0", 1)
    assert math.isnan(row.accuracy_std)


def test_a_batch_that_shrank_within_its_first_epoch_was_the_largest():
    """One that was decided on when training was over, or that a rollback took back at once, was
    never trained with."""
    rows = [
        growth(320, 32, 16),
        epoch(1, updates=80, batch=16),
        growth(1000, 16, 64),
        growth(1000, 64, 16),
    ]
    rows += [epoch(2, updates=140, batch=16), growth(2000, 16, 128)]
    assert compare_table(in_memory(rows)).rows[0].largest_batch == 32


def test_long_labels_are_cut_on_the_right_in_the_legend_and_nowhere_else(tmp_path):
    """Models of one's own have long names; here they differ at their end only."""
    names = ["package.module." + "network_" * 12 + end for end in ("a", "b")]
    folders = [write_run(tmp_path / n[-1], config={"settings": {"model": n}}) for n in names]
    (tmp_path / "c").mkdir()
    ended = {"status": "finished"}
    for seed in (0, 1):
        config = {"seed": seed, "settings": {"model": "c1"}}
        folders.append(write_run(tmp_path / "c" / str(seed), config=config, summary=ended))
    table = compare_table(folders)
    rows = csv.DictReader(io.StringIO(table.to_csv()))
    assert [row["settings"] for row in rows] == [f"model={name}" for name in (*names, "c1")]
    first, second, third = (line.get_label() for line in compare(folders).legends[0].get_lines())
    assert first.startswith("1: model=package.module.network_")
    assert second.startswith("2: model=package.module.network_")
    assert first.endswith("…")
    assert max(len(first), len(second)) <= 90
    assert third == "model=c1 (2 runs)"


def test_methods_are_told_apart_by_their_names_and_options(tmp_path):
    def folder(name, **settings):
        return write_run(tmp_path / name, config={"settings": {"epochs": 3, **settings}})

    def absa(patience):
        return {"name": "absa", "patience": patience, "decay_factor": 2.0}

    folders = [
        folder("a", controller=absa(5), optimizer={"name": "sgd", "momentum": 0.9}),
        folder("b", controller=absa(10), optimizer={"name": "sgd", "momentum": 0.9}),
        folder("c", controller={"name": "fixed"}, optimizer={"name": "sgd", "momentum": 0.9}),
    ]
    assert [row.settings for row in compare_table(folders).rows] == [
        "controller=absa, patience=5",
        "controller=absa, patience=10",
        "controller=fixed",
    ]


def test_a_run_in_the_words_of_an_older_release_is_of_the_same_group(tmp_path):
    today = {"controller": {"name": "absa", "patience": 5}, "optimizer": {"name": "sgd"}}
    older = {"controller": "absa", "patience": 5, "optimizer": "sgd", "edge_share": 0.75}
    folders = [
        write_run(tmp_path / "a", config={"settings": {"seed": 0, **today}}),
        write_run(tmp_path / "b", config={"settings": {"seed": 1, **older}}),
    ]
    [group] = group_runs(read_runs(folders))
    assert len(group.runs) == 2


def test_what_a_user_chose_names_groups_before_the_classes_that_it_led_to(tmp_path):
    """The optimizer led to another rate rule, whose class is no name for the difference."""
    configs = [
        {
            "settings": {"seed": 0, "optimizer": {"name": name}},
            "trainer": {"controller": controller, "optimizer": name.upper()},
        }
        for name, controller in (("sgd", "ABSA"), ("muon", "RateRule"))
    ]
    runs = [write_run(tmp_path / str(i), config=c) for i, c in enumerate(configs)]
    assert [row.settings for row in compare_table(runs).rows] == ["optimizer=sgd", "optimizer=muon"]
