"""What is measured of a run after the fact, by the command: nothing measured before is lost."""

import json
from pathlib import Path

import pytest
import torch

from hessianflow.cli import main

SMALL = ["--train-examples", "64", "--test-examples", "32", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert (
        main(["train", *SMALL, "--plots", "false", "--controller", "fixed", "--run-dir", "run"])
        == 0
    )
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_second_spectrum_adds_to_the_first(capsys):
    measure = ["spectrum", "run", "--examples", "32"]
    assert main([*measure, "--k", "2", "--trace", "true"]) == 0
    before = json.loads(Path("run/spectrum.json").read_text())
    assert main([*measure, "--k", "1", "--layers", "0"]) == 0
    after = json.loads(Path("run/spectrum.json").read_text())
    assert after["layers"]
    for name in ("trace", "eigenvalues", "residuals"):
        assert after[name] == before[name]
    capsys.readouterr()
    assert main(["spectrum", "run", "--examples", "16", "--k", "1"]) == 0
    assert (
        "run/spectrum-1.json (of other weights, examples or norm mode, measured earlier)"
        in capsys.readouterr().out
    )
    assert json.loads(Path("run/spectrum-1.json").read_text()) == after
    assert main(["report", "run"]) == 0


def test_other_attacks_are_kept_apart_and_the_report_shows_the_last(capsys):
    attack = ["robustness", "run", "--examples", "32", "--eps", "0.1"]
    for name in ("fgsm", "pgd2"):
        assert main([*attack, "--attack", name]) == 0
    assert (
        "run/robustness-1.json (other attacks, sizes or examples, measured earlier)"
        in capsys.readouterr().out
    )
    assert set(json.loads(Path("run/robustness-1.json").read_text())["accuracy"]) == {
        "clean",
        "fgsm",
    }
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert "Accuracy under attack: run" in page
    assert "pgd2" in page


def test_an_attack_may_have_a_size_for_each_channel(capsys):
    quick = ["train", *SMALL, "--plots", "false", "--overfitting-alarm", "--adversary.eps"]
    losses = []
    for name, size in (("one", "0.1"), ("each", "[0.1]")):
        assert main([*quick, size, "--run-dir", name]) == 0
        lines = map(json.loads, Path(name, "history.jsonl").read_text().splitlines())
        losses.append([row["train_loss"] for row in lines if row["kind"] == "epoch"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert main([*quick, "[0.1, 0.2]", "--run-dir", "two"]) == 2
    assert "--adversary.eps must be one number or one per channel, 1, got" in (
        capsys.readouterr().err
    )
