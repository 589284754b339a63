"""The grid runner: what is run, what is not, what is left behind; on runs that take
milliseconds."""

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.controllers.grid import METHODS, PROBLEMS
from experiments.devices import least_used, visible_devices
from experiments.results import FORMAT, append_row, groups, read_rows, write_reports
from experiments.runner import Cell, Outcome, Scale, Study, Workplace, main, run_grid
from hessianflow.interfaces import HessianFlowError

STAND_IN = "tests.experiments.stand_in"


def cell(method: str = "fixed", seed: int = 0, behaviour: str = "finish", **settings: Any) -> Cell:
    return Cell(
        "toy", method, seed, {"data": "fake", **settings}, STAND_IN, {"behaviour": behaviour}
    )


def run(tmp_path: Path, found: Sequence[Cell], jobs: int = 1) -> list[Outcome]:
    return list(run_grid(found, tmp_path / "results.jsonl", Workplace(tmp_path / "runs"), jobs))


def starts(tmp_path: Path, method: str = "fixed") -> list[str]:
    return (tmp_path / "runs" / "toy" / method / "starts.txt").read_text().split()


def test_each_finished_cell_gives_one_row(tmp_path: Path) -> None:
    outcomes = run(tmp_path, [cell(seed=0), cell(seed=1)], jobs=2)
    assert all(outcome.error == "" for outcome in outcomes)
    rows = sorted(read_rows(tmp_path / "results.jsonl"), key=lambda row: int(row["seed"]))
    assert [row["updates"] for row in rows] == [4, 5]
    row = rows[0]
    assert (row["accuracy"], row["largest_batch"], row["seconds"], row["format"]) == (
        0.5,
        64,
        1.5,
        FORMAT,
    )
    assert row["growths"] == [{"epoch": 1, "from": 32, "to": 64, "reason": "why"}]
    assert row["epochs"][0]["eigenvalue"] == 2.5
    assert row["settings"] == {"data": "fake", "behaviour": "finish", "seed": 0}
    assert "cores" in row["hardware"]
    assert row["environment"]["python"] == "3"


def test_a_finished_cell_is_not_repeated(tmp_path: Path) -> None:
    run(tmp_path, [cell()])
    assert run(tmp_path, [cell()]) == []
    assert starts(tmp_path) == ["started"]


def test_changed_settings_run_afresh(tmp_path: Path) -> None:
    run(tmp_path, [cell()])
    run(tmp_path, [cell(lr=0.5)])
    assert starts(tmp_path) == ["started", "started"]
    assert [row["settings"].get("lr") for row in read_rows(tmp_path / "results.jsonl")] == [0.5]


def test_an_interrupted_cell_is_continued(tmp_path: Path) -> None:
    first = run(tmp_path, [cell(behaviour="die")])
    assert first[0].error == "exit status -9: no message"
    second = run(tmp_path, [cell(behaviour="die")])
    assert second[0].error == ""
    assert starts(tmp_path) == ["started", "continued"]


def test_a_failure_is_reported_and_the_others_run(tmp_path: Path) -> None:
    outcomes = run(
        tmp_path, [cell("bad", behaviour="fail"), cell("late", behaviour="preempted"), cell("good")]
    )
    errors = {outcome.cell.method: outcome.error for outcome in outcomes}
    assert errors["bad"] == "exit status 3: it broke"
    assert errors["late"] == "stopped before the last epoch; run again to continue"
    assert errors["good"] == ""
    assert [row["method"] for row in read_rows(tmp_path / "results.jsonl")] == ["good"]


def test_an_impossible_cell_is_reported_and_the_others_run(tmp_path: Path) -> None:
    impossible = [
        cell("a", batch_size=64, max_batch_size=32),
        cell("b", no_such=1),
        cell("c", lr=-1.0),
    ]
    outcomes = run(tmp_path, [*impossible, cell("good")])
    errors = {outcome.cell.method: outcome.error for outcome in outcomes}
    assert "--max-batch-size 32 is below --batch-size 64" in errors["a"]
    assert "unknown settings no_such" in errors["b"]
    assert "--lr must be at least 0" in errors["c"]
    assert errors["good"] == ""


def test_every_process_gets_a_device_and_what_it_measured_goes_into_its_row(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "runs", devices=("0", "3"))
    found = [cell(seed=seed, behaviour="tell device") for seed in (0, 1)]
    rows = [outcome.row for outcome in run_grid(found, tmp_path / "results.jsonl", place, jobs=2)]
    assert sorted(row["measured"]["device"] for row in rows if row) == ["0", "3"]


def test_devices_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    assert visible_devices() == ["4", "GPU-ab"]
    assert least_used(["4", "GPU-ab"], ["4", None]) == "GPU-ab"
    assert least_used([], []) is None


def test_stopping_ends_the_running_processes(tmp_path: Path) -> None:
    grid = run_grid(
        [cell(), cell("long", behaviour="hang")],
        tmp_path / "r.jsonl",
        Workplace(tmp_path / "runs"),
        2,
    )
    assert next(grid).cell.method == "fixed"
    began = time.monotonic()
    grid.close()
    assert time.monotonic() - began < 60


def test_rows_that_were_cut_short_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(tmp_path, [cell()])
    whole = path.read_text()
    path.write_text(whole + '{"format": 1, "prob')
    assert len(read_rows(path)) == 1
    append_row(path, {"problem": "toy", "method": "other", "seed": 0})
    assert path.read_text().startswith(whole)
    assert [row["method"] for row in read_rows(path)] == ["fixed", "other"]


def test_a_last_row_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"format": FORMAT, "problem": "toy", "method": "a", "seed": 0}))
    append_row(path, {"problem": "toy", "method": "b", "seed": 0})
    assert [row["method"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize("line", ["not json", "[1]", "3"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f"{line}\n{{}}\n")
    with pytest.raises(HessianFlowError, match=r"results\.jsonl line 1 is not a JSON object"):
        read_rows(path)


CELL = '{"format": 1, "problem": "toy", "method": "a", "seed": 0'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            b'{"format": 1, "problem": null, "method": "a", "seed": 0}',
            "problem must be text, got null",
        ),
        (f'{CELL}, "accuracy": "high"}}', 'accuracy must be a number or null, got "high"'),
        (f'{CELL}, "largest_batch": [1]}}', r"largest_batch must be a whole number, got \[1\]"),
        (f'{CELL}, "epochs": null}}', "epochs must be a list, got null"),
        (f'{CELL}, "epochs": [{{}}]}}', "epochs.0.batch_size is missing"),
        (f'{CELL}, "updates": {"9" * 400}}}', "updates must be a finite number"),
        (f'{CELL}, "seconds": 1e999}}', "seconds must be a finite number"),
        (
            f'{CELL}, "measured": {{"cpu_seconds": "x"}}}}',
            'measured.cpu_seconds must be a number, got "x"',
        ),
        (f'{CELL}, "settings": {"[" * 100_000}', "lists or objects are nested deeper than 50"),
        (b"\xff\xfe\n", "is not a JSON object"),
        ("x" * (2**24 + 2), "is longer than 16777216 bytes"),
    ],
    ids=range(11),
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str | bytes, words: str) -> None:
    text = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "results.jsonl").write_bytes(text + b"\n{}\n")
    with pytest.raises(HessianFlowError, match=rf"results\.jsonl line 1:? {words}"):
        read_rows(tmp_path / "results.jsonl")


def test_tables_hold_any_name_literally(tmp_path: Path) -> None:
    rows = [
        {**row, "problem": r"\input{x} ~^$", "method": "=<b>|"} for row in rows_of_two_methods()[:2]
    ]
    write_reports(rows, tmp_path)
    latex = (tmp_path / "table.tex").read_text()
    assert r"\textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}\$" in latex
    assert "&lt;b>\\|" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().splitlines()[1].split(",")[1] == "'=<b>|"


def test_rows_that_lack_something_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, {"problem": "toy", "method": "a", "seed": 0})
    assert main(toy_study(tmp_path), ["--report"]) == 2
    assert "a row of toy a has no accuracy: delete it" in capsys.readouterr().err
    append_row(path, {"problem": "toy", "method": "a"})
    with pytest.raises(HessianFlowError, match=r"results\.jsonl line 2 has no seed"):
        read_rows(path)


def test_a_run_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    outcomes = run(tmp_path, [cell("odd", behaviour="leave a damaged summary"), cell("good")])
    assert "summary.json" in outcomes[0].error
    assert outcomes[1].error == ""


def test_rows_of_an_older_format_are_left_and_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    old = json.dumps({"format": FORMAT - 1, "problem": "toy", "method": "fixed", "seed": 0})
    path.write_text(old + "\n")
    assert len(run(tmp_path, [cell()])) == 1
    assert f"1 rows of a format other than {FORMAT} not used" in capsys.readouterr().err
    assert path.read_text().startswith(old)
    assert len(read_rows(path)) == 1


def test_of_two_rows_of_a_cell_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for updates in (1, 2):
        append_row(path, {"problem": "toy", "method": "a", "seed": 0, "updates": updates})
    assert [row["updates"] for row in read_rows(path)] == [2]


def rows_of_two_methods() -> list[dict[str, Any]]:
    epochs = [{"batch_size": 32}, {"batch_size": 64}]
    common = {"problem": "toy", "largest_batch": 64, "seconds": 2.0, "epochs": epochs}
    return [
        {**common, "method": "a_1", "seed": 1, "accuracy": 0.62, "updates": 10},
        {**common, "method": "a_1", "seed": 0, "accuracy": 0.6, "updates": 20},
        {**common, "method": "b", "seed": 0, "accuracy": 0.7, "updates": 5},
    ]


def test_tables_hold_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    """60 and 62 %: mean 61, sample standard deviation sqrt(2)."""
    paths = write_reports(rows_of_two_methods(), tmp_path)
    assert [path.name for path in paths] == ["table.md", "table.tex", "table.csv", "results.png"]
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert markdown[2] == "| toy | a_1 | 60.00 62.00 | 61.00 | 1.41 | 15 | 64 | 2 |"
    assert markdown[3] == "| toy | b | 70.00 | 70.00 |  | 5 | 64 | 2 |"
    assert r"toy & a\_1 & 60.00 62.00 & 61.00" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "table.csv").read_text().splitlines()[
        1
    ] == "toy,a_1,60.00 62.00,61.00,1.41,15,64,2"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_groups_keep_the_order_of_the_grid() -> None:
    assert [(group.problem, group.method) for group in groups(rows_of_two_methods())] == [
        ("toy", "a_1"),
        ("toy", "b"),
    ]
    assert write_reports([], Path("nowhere")) == []


def toy_study(folder: Path) -> Study:
    def grid(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
        return [
            cell(f"{scale}-{name}", seed, behaviour=name)
            for seed in seeds
            for name in ("finish", "fail once")
        ]

    return Study("toy", folder, grid)


def test_the_command_reports_progress_failures_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, options = (
        toy_study(tmp_path / "study"),
        ["--seeds", "0", "--runs", str(tmp_path / "runs")],
    )
    assert main(study, options) == 1
    told = capsys.readouterr()
    assert "2 cells, 0 of them in" in told.out
    assert "toy cpu-finish seed 0: 50.00%, 4 updates" in told.out
    assert "failed: toy cpu-fail once seed 0: exit status 3: it broke" in told.err
    assert main(study, options) == 0
    told = capsys.readouterr()
    assert "2 cells, 1 of them in" in told.out
    assert len(read_rows(tmp_path / "study" / "results.jsonl")) == 2
    assert main(study, [*options, "--report"]) == 0
    assert "table.md" in capsys.readouterr().out


def test_only_picks_cells_and_smoke_stays_out_of_the_study(tmp_path: Path) -> None:
    study = toy_study(tmp_path / "study")
    assert (
        main(
            study,
            [
                "--smoke",
                "--only",
                "toy/smoke-fin*",
                "--seeds",
                "0",
                "--runs",
                str(tmp_path / "runs"),
            ],
        )
        == 0
    )
    assert [row["method"] for row in read_rows(tmp_path / "runs" / "smoke" / "results.jsonl")] == [
        "smoke-finish"
    ]
    assert not (tmp_path / "study").exists()


def test_a_pattern_that_fits_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(toy_study(tmp_path), ["--only", "typo/*"]) == 2
    assert capsys.readouterr().err == "toy: no cell of the cpu grid fits --only typo/*\n"


@pytest.mark.parametrize("jobs", ["0", "-1", "1e3", "99999999999999999999", "", "two"])
def test_a_number_of_jobs_that_cannot_be_is_one_line(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(toy_study(tmp_path / "study"), ["--jobs", jobs])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--jobs: must be a whole number from 1 to 1024" in err
    assert not (tmp_path / "study").exists()
    with pytest.raises(HessianFlowError, match="jobs must be at least 1, got 0"):
        run(tmp_path, [cell()], jobs=0)


def study_of(folder: Path, recorded: Path, data: str) -> Study:
    def grid(_scale: Scale, seeds: Sequence[int]) -> list[Cell]:
        return [Cell("toy", "fixed", seed, {"data": data}, STAND_IN) for seed in seeds]

    return Study("toy", folder, grid, recorded=recorded)


def test_a_study_without_its_data_says_so_once_before_the_first_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(tmp_path / "mine", tmp_path / "theirs", "cifar10")
    (tmp_path / "empty").mkdir()
    for options, words in (
        ([], "toy: cifar10 is needed: name the folder of its official files with --data-dir"),
        (["--data-dir", str(tmp_path / "empty")], f"under {tmp_path / 'empty'}"),
    ):
        assert main(study, ["--runs", str(tmp_path / "runs"), *options]) == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1
        assert words in told.err
        assert told.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"], (
        "nothing was begun, nothing written"
    )


def test_what_comes_with_a_study_is_neither_skipped_nor_added_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows there tell how long a cell took; the same cell runs here all the same."""
    theirs = tmp_path / "theirs" / "results.jsonl"
    settings = {"data": "fake", "seed": 0}
    row = {
        "problem": "toy",
        "method": "fixed",
        "seed": 0,
        "seconds": 120.0,
        "hardware": "an abacus",
    }
    append_row(theirs, {**row, "settings": settings})
    before = theirs.read_bytes()
    study = study_of(tmp_path / "mine", tmp_path / "theirs", "fake")
    options = ["--runs", str(tmp_path / "runs"), "--seeds", "0"]
    assert main(study, options) == 0
    assert "1 cells, 0 of them in" in (out := capsys.readouterr().out)
    assert "1 of the rest took 2 min, one by one, on an abacus" in out
    assert theirs.read_bytes() == before
    assert [path.name for path in theirs.parent.iterdir()] == ["results.jsonl"]
    assert len(read_rows(tmp_path / "mine" / "results.jsonl")) == 1
    assert main(study, ["--smoke", *options, "--out", str(tmp_path / "theirs")]) == 2
    assert "rows of made-up data do not belong there" in capsys.readouterr().err
    assert theirs.read_bytes() == before


def test_a_study_whose_cells_all_fail_leaves_its_tables_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def grid(_scale: Scale, _seeds: Sequence[int]) -> list[Cell]:
        return [cell("bad", behaviour="fail")]

    append_row(tmp_path / "study" / "results.jsonl", rows_of_two_methods()[0])
    assert main(Study("toy", tmp_path / "study", grid), ["--runs", str(tmp_path / "runs")]) == 1
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["results.jsonl"]
    assert "failed: toy bad seed 0: exit status 3: it broke" in capsys.readouterr().err


def test_a_report_without_rows_says_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(tmp_path / "mine", tmp_path / "theirs", "fake")
    assert main(study, ["--report"]) == 2
    assert (
        "holds no rows: run the study first, or name those that come with it: --out"
        f" {tmp_path / 'theirs'}" in (capsys.readouterr().err)
    )


GOOD = {
    "problem": "toy",
    "method": "a",
    "seed": 0,
    "accuracy": 0.5,
    "updates": 4,
    "largest_batch": 64,
    "seconds": 1.5,
}


def test_a_row_of_another_study_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def figure(rows: Sequence[dict[str, Any]], _path: Path) -> None:
        raise KeyError("measured")

    append_row(tmp_path / "results.jsonl", {**GOOD, "epochs": []})
    study = Study("toy", tmp_path, toy_study(tmp_path).cells, figure)
    assert main(study, ["--report"]) == 2
    assert "holds a row that is not of this study (KeyError 'measured')" in capsys.readouterr().err


def test_a_damaged_results_file_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_text("?\n\n")
    assert main(toy_study(tmp_path), ["--runs", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_signal_stops_the_grid_and_it_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def grid(_scale: Scale, _seeds: Sequence[int]) -> list[Cell]:
        return [cell("long", behaviour="hang")]

    def stop_once_started() -> None:
        while not (tmp_path / "runs" / "toy" / "long" / "starts.txt").is_file():
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop_once_started).start()
    assert main(Study("toy", tmp_path, grid), ["--runs", str(tmp_path / "runs")]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_every_method_has_settings_for_every_problem() -> None:
    from experiments.controllers.grid import cell as made

    for problem, settings in PROBLEMS.items():
        for method in METHODS:
            made(problem, settings, method, 0).check()
