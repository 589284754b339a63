"""`hessianflow critical-batch`: the table and its files, a second call, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from hessianflow.cli import main

TRAIN = ["train", "--data", "digits", "--train-examples", "64", "--test-examples", "32"]
TRAIN += ["--epochs", "3", "--batch-size", "8", "--plots", "false", "--controller", "fixed"]
TRAIN += ["--adversary", "none", "--curvature", "off", "--keep-checkpoints", "5"]
FOLDER = Path("run/critical-batch/epoch-1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    assert main([*TRAIN, "--run-dir", str(folder / "run")]) == 0
    yield folder / "run"
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def run_dir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")


def contents(folder: Path):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "critical-batch" not in path.parts
    }


def measure(*words: str, capsys) -> tuple[int, str, str]:
    status = main(["critical-batch", "run", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_the_files_and_a_run_that_stays_as_it_was(capsys):
    before = contents(Path("run"))
    status, out, _ = measure("--epoch", "1", "--repeats", "2", capsys=capsys)
    assert status == 0
    assert contents(Path("run")) == before
    found = json.loads((FOLDER / "critical_batch.json").read_text())
    assert found["settings"]["batch_sizes"] == [8, 16]  # 16 steps of 16 are four epochs of 64
    assert found["settings"]["lr_rule"] == "linear"
    assert found["settings"]["examples"] == 256
    rows = list(csv.DictReader((FOLDER / "critical_batch.csv").read_text().splitlines()))
    assert [(row["batch_size"], row["updates"]) for row in rows] == [("8", "32"), ("16", "16")]
    assert float(rows[1]["lr_factor"]) == 2.0
    assert found["critical"] in (8, 16)
    assert len(found["branches"]) == 4
    assert (FOLDER / "critical_batch.png").stat().st_size > 5000
    lines = out.splitlines()
    assert lines[0].startswith("epoch 1, rate 0.05 at batch 8, rule linear, 256 examples a branch")
    assert lines[1].split() == ["batch", "updates", "rate", "loss", "excess", "+-"]
    assert lines[4].startswith(f"critical batch: {found['critical']}")


def test_a_second_call_adds_repeats_and_keeps_what_other_settings_measured(capsys):
    assert measure("--epoch", "1", "--repeats", "1", capsys=capsys)[0] == 0
    file = FOLDER / "critical_batch.json"
    before = json.loads(file.read_text())["branches"]
    assert measure("--epoch", "1", "--repeats", "2", capsys=capsys)[0] == 0
    after = json.loads(file.read_text())["branches"]
    assert after[:2] == before
    assert len(after) == 4
    assert after[0]["losses"] != after[2]["losses"], "another repeat sees other examples"
    status, out, _ = measure("--epoch", "1", "--lr-rule", "sqrt", "--repeats", "1", capsys=capsys)
    assert status == 0
    assert "critical_batch-1.json (under other settings, measured earlier)" in out
    assert json.loads((FOLDER / "critical_batch-1.json").read_text())["branches"] == after


def test_a_branch_is_the_same_whether_it_is_run_alone_or_after_others(capsys):
    assert measure("--epoch", "1", "--repeats", "2", capsys=capsys)[0] == 0
    file = FOLDER / "critical_batch.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "branches": whole["branches"][:3]}))
    assert measure("--epoch", "1", "--repeats", "2", capsys=capsys)[0] == 0
    assert json.loads(file.read_text())["branches"] == whole["branches"]


def test_where_the_smallest_batch_diverges_no_batch_is_called_critical(capsys):
    status, out, error = measure(
        "--epoch", "1", "--repeats", "1", "--lr", "1e6", "--examples", "64", capsys=capsys
    )
    assert status == 2
    assert "critical batch" not in out
    assert error.splitlines()[-1].endswith(
        "branches of the smallest batch, 8, diverged, so there is nothing to compare with: name a"
        " lower rate than 1e+06 with --lr"
    )


def test_results_go_where_they_are_wanted_and_a_damaged_file_is_set_aside(capsys):
    Path("there").mkdir()
    Path("there/critical_batch.json").write_text("{")
    words = ["--epoch", "1", "--repeats", "1", "--out", "there", "--batch-sizes", "[4, 8]"]
    status, out, _ = measure(*words, capsys=capsys)
    assert status == 0
    assert not Path("run/critical-batch").exists()
    assert Path("there/critical_batch-1.json").read_text() == "{"
    assert "there/critical_batch.png" in out


MISTAKES = {
    "no checkpoint in run/checkpoints is of that epoch; there is 1, 2, 3": ["--epoch", "9"],
    "6 does not divide the largest, 8": ["--batch-sizes", "[6, 8]"],
    "must hold 2 to 50 different sizes, got 1": ["--batch-sizes", "[8, 8]"],
    "128 is larger than the 64 training examples": ["--batch-sizes", "[8, 128]"],
    "must be a multiple of the largest batch, 16": ["--examples", "100", "--epoch", "1"],
    "--repeats must be at least 1": ["--repeats", "0"],
    "--tolerance must be at least 0": ["--tolerance", "-1"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_in_one_line(message, capsys):
    before = contents(Path("run"))
    status, _, err = measure(*MISTAKES[message], capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert contents(Path("run")) == before
    assert not Path("run/critical-batch").exists()


def test_a_run_without_checkpoint_and_one_whose_rate_is_0(capsys):
    state = torch.load("run/checkpoints/last.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = 0.0
    torch.save(state, "run/checkpoints/last.pt")
    status, _, err = measure(capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "last.pt is 0, so branches would stand still" in err
    assert measure("--lr", "0.1", "--repeats", "1", capsys=capsys)[0] == 0
    shutil.rmtree("run/checkpoints")
    status, _, err = measure(capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "no checkpoint at run/checkpoints/last.pt" in err


@pytest.mark.parametrize("damage", [[], [{}], [{"lr": "much"}]])
def test_a_damaged_optimizer_is_told_in_one_line(damage, capsys):
    state = torch.load("run/checkpoints/last.pt", weights_only=True)
    state["optimizer"]["param_groups"] = damage
    torch.save(state, "run/checkpoints/last.pt")
    status, _, err = measure(capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "last.pt" in err


def test_a_run_whose_data_are_gone(capsys):
    config = json.loads(Path("run/config.json").read_text())
    config["settings"] |= {"data": "cifar10", "data_dir": "gone", "model": "resnet20"}
    Path("run/config.json").write_text(json.dumps(config))
    status, _, err = measure(capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "gone" in err


def test_attacks_are_left_out_and_told(capsys):
    config = json.loads(Path("run/config.json").read_text())
    config["settings"]["adversary"] = {"name": "fgsm"}
    Path("run/config.json").write_text(json.dumps(config))
    status, out, _ = measure("--epoch", "1", "--repeats", "1", capsys=capsys)
    assert status == 0
    assert out.startswith("branches train on clean examples, without the fgsm attack\n")
