"""Resolutions and dual-batch runs from the command line."""

from pathlib import Path

import pytest
import torch

from hessianflow import History
from hessianflow.cli import main

FAKE = ["--data", "fake", "--model", "resnet8", "--train-examples", "256", "--test-examples", "64", "--plots", "false"]
CYCLIC = ["--resolution", "cyclic", "--epochs", "4", "--milestones", "[2]", "--curvature", "off"]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of one command in this process."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_resolution_under_any_controller(capsys):
    plan = [*CYCLIC, "--resolution-batch-sizes", "[64, 32]", "--dropouts", "[0.1, 0.2]", "--batch-size", "32"]
    status, _, err = run(
        "train", *FAKE, *plan, "--controller", "fixed", "--adversary", "none", "--run-dir", "r", capsys=capsys
    )
    assert (status, err) == (0, "")
    history = History.load("r")
    assert [row["updates"] for row in history.epochs] == [4, 12, 16, 24]
    stages = [
        (s["start"], s["end"], s["level"]["resolution"], s["level"]["dropout"])
        for s in history.config["resolution_stages"]
    ]
    assert stages == [(0, 1, 12, 0.1), (1, 2, 16, 0.2), (2, 3, 12, 0.1), (3, 4, 16, 0.2)]
    assert history.of_kind("batch")[0]["reason"] == "resolution 16 from epoch 1 on"
    assert run("spectrum", "r", "--k", "1", capsys=capsys)[0] == 0, "the model is built with its dropout again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "cyclic", "--epochs", "9", "--model", "c1"], "layer '9' (Linear(in_features=1024"),
        (["--resolution", "cyclic", "--resolutions", "[16, 24]"], "--resolutions must end with 16, the pixels a side"),
        (["--resolution", "cyclic", "--resolutions", "[16, 12]"], "--resolutions must be one or more increasing sizes"),
        (["--resolution", "cyclic", "--epochs", "1"], "--resolution cyclic: phase_ends must leave 2 epochs for 2"),
        (["--resolutions", "[12, 16]"], "--resolutions needs --resolution cyclic, once or uniform"),
        (["--resolution", "once", "--dropouts", "[0.1]"], "--dropouts must hold one value for each of the 2 resolutio"),
        (["--resolution", "once", "--dropouts", "[0.1, 1.0]"], "--dropouts must lie in [0, 1), got [0.1, 1.0]"),
        (["--resolution", "once", "--resolution-batch-sizes", "[0, 1]"], "--resolution-batch-sizes must be 1 or more"),
        (["--workers", "2"], "--workers is a setting of --controller dual-batch; processes that load images are"),
        (["--extra-time", "1.1"], "--extra-time is a setting of --controller dual-batch"),
    ],
)
def test_bad_resolutions_are_one_line(arguments: list[str], words: str, capsys):
    status, _, err = run("train", *FAKE, "--controller", "fixed", *arguments, capsys=capsys)
    assert status == 2
    assert err.startswith("hessianflow train: error: ")
    assert words in err
    assert err.count("\n") == 1
