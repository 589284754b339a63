"""`hessianflow plan`: predictions worked by hand, and where each number is said to come from."""

import json
from pathlib import Path

import pytest
import torch

from hessianflow import History
from hessianflow.cli import main
from hessianflow.planning import Phase
from hessianflow.planning.measure import merged, recorded_phases, worker_counts

# 1 ms an example, 8 ms a microbatch of at most 16; 8 MB of gradients over 1 GB/s links with 0.5 ms
# a message.
FIGURES = [
    "--slope",
    "1e-3",
    "--intercept",
    "8e-3",
    "--update-seconds",
    "4e-3",
    "--gradient-bytes",
    "8000000",
]
LINKS = ["--bandwidth", "1e9", "--latency", "5e-4"]
RUN = [
    "--train-examples",
    "640",
    "--microbatch-size",
    "16",
    "--batch-size",
    "64",
    "--controller",
    "fixed",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def plan(*arguments: str) -> dict:
    """plan.json of a command that succeeds."""
    assert main(["plan", "--out", "out", *arguments]) == 0
    assert Path("out/plan.png").stat().st_size > 5000
    return json.loads(Path("out/plan.json").read_text())


def test_one_and_four_workers_by_hand(capsys):
    """Batch 64. W=1: 4 microbatches, 32 + 64 ms, update 4: 100 ms. W=4: 8 + 16, all-reduce 2 +
    1.5*8, 4: 42 ms."""
    found = plan(*FIGURES, *LINKS, *RUN, "--epochs", "3", "--workers", "1,4", "--price", "3.6")
    alone, four = found["predictions"]
    assert (alone["seconds"], four["seconds"]) == pytest.approx((3.0, 1.26))
    assert (alone["updates"], four["updates"]) == (30, 30)
    assert four["efficiency"] == pytest.approx(1 / 1.68)
    assert four["cost"] == pytest.approx(4 * 1.26e-3)  # 3.6 an hour is a thousandth a second
    out = capsys.readouterr().out
    assert "8 ms + 1 ms an example: as given" in out
    assert "1 GB/s: as given" in out
    assert "59.5%" in out
    assert "fastest on 4: 1260 ms" in out


def test_a_plan_without_data_names_its_defaults(capsys):
    """Nothing is read where sizes are given: data sets that are not there can be planned for."""
    options = [
        "--data",
        "imagenet",
        "--batch-size",
        "256",
        "--max-batch-size",
        "256",
        "--train-examples",
        "1281167",
    ]
    found = plan(*FIGURES, *options, "--epochs", "90")
    assert [p["workers"] for p in found["predictions"]] == [2**power for power in range(11)]
    assert found["predictions"][0]["updates"] == 90 * 5005
    assert found["all_reduce"] == {"latency": 5e-5, "bandwidth": 1.25e9}
    out = capsys.readouterr().out
    assert "default, the line rate of 10-gigabit Ethernet" in out
    assert " h " in out


def test_steps_are_measured_here_and_can_be_taken_elsewhere():
    options = ["--workers", "1..3", "--epochs", "2"]
    found = plan(*options)
    assert found["measured"]["sizes"] == [4, 8, 16, 32]
    assert found["measured"]["gradient_bytes"] == 4 * sum(
        p.numel() for p in torch_model().parameters()
    )
    assert found["measured"]["update_seconds"] > 0
    assert "measured here: digits-cnn" in found["sources"]["step"]
    Path("out/plan.json").rename("here.json")
    again = plan(*options, "--measured", "here.json")
    assert again["predictions"] == found["predictions"]
    assert again["sources"]["step"].endswith("(here.json); 4 sizes up to 32, at most " + fit(found))


@pytest.mark.parametrize(
    ("seconds", "doubtful"),
    [
        ([0.012, 0.016, 0.024, 0.04], False),
        ([0.012, 0.016, 0.024, 0.08], True),
        ([0.004, 0.008, 0.016, 0.032], True),
    ],
    ids=["8 ms + 1 ms an example", "one far off", "no fixed cost"],
)
def test_step_times_that_make_no_line_are_called_doubtful(
    seconds: list[float], doubtful: bool, capsys
):
    measured = {
        "sizes": [4, 8, 16, 32],
        "seconds": seconds,
        "update_seconds": 0.001,
        "gradient_bytes": 8000,
    }
    Path("times.json").write_text(json.dumps(measured))
    found = plan("--measured", "times.json", *RUN, "--epochs", "1", "--workers", "1,2")
    assert ("doubtful" in found["sources"]) == doubtful
    assert ("make no clean line" in capsys.readouterr().out) == doubtful


def torch_model() -> torch.nn.Module:
    from hessianflow import models

    return models.create("digits-cnn", input_size=8, in_channels=1)


def fit(found: dict) -> str:
    return f"{found['measured']['residual']:.0%} off the line"


@pytest.mark.slow
def test_batches_of_a_run_are_those_it_made(capsys):
    assert (
        main(
            [
                "train",
                "--epochs",
                "4",
                "--controller.patience",
                "1",
                "--plots",
                "false",
                "--run-dir",
                "run",
            ]
        )
        == 0
    )
    assert main(["plan", "--run", "run", *FIGURES]) == 0
    found = json.loads(Path("run/plan/plan.json").read_text())
    history = History.load("run")
    assert {p["updates"] for p in found["predictions"]} == {history.summary["updates"]}
    assert [p["batch_size"] for p in found["phases"]] == [32, 64, 128, 256]
    assert "recorded in run" in capsys.readouterr().out


def test_batches_of_a_run_that_was_never_made(capsys):
    """AdaBatch doubles every 20 epochs; ABSA without eigenvalues at the ends of its patience."""
    found = plan(*FIGURES, "--controller", "adabatch", "--epochs", "30", "--train-examples", "1000")
    assert found["phases"] == [
        {"examples": 20000, "batch_size": 32},
        {"examples": 10000, "batch_size": 64},
    ]
    found = plan(
        *FIGURES, "--controller.patience", "2", "--epochs", "4", "--train-examples", "1000"
    )
    assert found["phases"] == [
        {"examples": 2000, "batch_size": 32},
        {"examples": 2000, "batch_size": 64},
    ]
    assert "growing by patience alone" in capsys.readouterr().out


def test_rollbacks_and_growths_within_an_epoch():
    """Grown at 1500 and 1800 examples, rolled back to 1000 and held at 32 from there on, grown
    again at 2500."""
    rows = [(1500, 32, 64), (1800, 64, 128), (1000, 128, 32), (2500, 32, 48)]
    records = [
        {"kind": "batch", "examples": at, "from": before, "to": after} for at, before, after in rows
    ]
    trainer = {"examples_per_epoch": 1000, "reference_batch_size": 32}
    phases = recorded_phases(History(records, {"trainer": trainer}), 3)
    assert phases == [Phase(1000, 32), Phase(1000, 32), Phase(500, 32), Phase(500, 48)]
    assert merged(phases) == [Phase(2500, 32), Phase(500, 48)]


def test_numbers_of_workers():
    assert worker_counts("1..1024") == [2**power for power in range(11)]
    assert worker_counts("3..20") == [3, 6, 12, 20]
    assert worker_counts("7..7") == [7]
    assert worker_counts("6,1,2") == [1, 2, 6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--workers", "8..1"],
            "--workers must be a range like 1..1024 or a list like 1,2,6 from 1 on, got 8..1",
        ),
        (["--workers", "0..4"], "got 0..4"),
        (["--workers", "many"], "got many"),
        (["--slope", "1e-3"], "--slope and --intercept belong together"),
        (["--slope", "0", "--intercept", "0"], "--slope must be greater than 0, got 0"),
        (["--price", "-1"], "--price must be at least 0, got -1"),
        (["--bandwidth", "0"], "--bandwidth must be greater than 0, got 0"),
        ([*FIGURES, "--measured", "x.json"], "leave one out"),
        (["--measured", "x.json"], "--measured x.json: there is no such file"),
        (["--measured", "empty.json"], "must hold sizes and seconds"),
        (["--run", "nowhere"], "nowhere is not a run directory"),
        (
            ["--controller", "noise-scale", *FIGURES],
            "--controller noise-scale decides from measurements",
        ),
        (["--data", "cifar10"], "--data cifar10 needs --data-dir"),
        ([*FIGURES, "--out", "empty.json/plan"], "cannot write to empty.json/plan"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], words: str, capsys):
    Path("empty.json").write_text("{}")
    try:
        status = main(["plan", *arguments])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1), err
    assert words in err


def test_settings_of_a_run_are_not_mixed_with_others(capsys):
    assert main(["train", "--epochs", "1", "--plots", "false", "--run-dir", "run"]) == 0
    assert main(["plan", "--run", "run", "--batch-size", "64", *FIGURES]) == 2
    assert "--batch-size 64: --run run sets that, leave one out" in capsys.readouterr().err
