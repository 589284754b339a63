"""The command as a user meets it: exit status, one clear line, files on disk; interrupted and
resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

import hessianflow
from hessianflow import History
from hessianflow.parts import load_parts

SPREAD = True
QUICK = ["--epochs", "2", "--plots", "false", "--train-examples", "512", "--test-examples", "100"]


@pytest.mark.slow
def test_train_with_no_argument_reaches_its_promise(tmp_path: Path, capsys):
    """>= 97 % on the test digits, at least three growths, each with its reason, and the plots."""
    status, out, _ = run("train", capsys=capsys)
    assert status == 0
    [run_dir] = (tmp_path / "runs").iterdir()
    history = History.load(run_dir)
    assert history.summary["final_accuracy"] >= 0.97
    assert len(history.growths) >= 3
    assert all(row["reason"] for row in history.growths)
    assert history.summary["updates"] * 2 <= 30 * 45  # 45 updates an epoch at the fixed batch of 32
    assert run_dir.name in out
    assert {p.name for p in (run_dir / "plots").iterdir()} == {
        "curvature_trajectory.png",
        "training_curves.png",
    }
    names = {
        "config.json",
        "settings.yaml",
        "history.jsonl",
        "summary.json",
        "checkpoints",
        "plots",
    }
    assert {p.name for p in run_dir.iterdir()} == names
    assert (
        torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["updates"]
        == history.summary["updates"]
    )
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["batch_size"] == 32
    assert config["environment"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "mnist"], ["--data: unknown data set 'mnist'", "digits"]),
        (["--model", "resnet21"], ["--model: unknown model 'resnet21'", "resnet20"]),
        (["--controller", "magic"], ["--controller: unknown controller 'magic'", "absa"]),
        (["--nonsense", "1"], ["unknown option", "--nonsense"]),
        (["--batch-size", "many"], ["--batch-size", "int", "many"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1", "0"]),
        (["--batch-size", "2000"], ["--batch-size 2000", "1438 training examples"]),
        (["--max-batch-size", "1439"], ["--max-batch-size 1439", "1438 training examples"]),
        (
            ["--batch-size", "64", "--max-batch-size", "32"],
            ["--max-batch-size 32", "below --batch-size 64"],
        ),
        (["--max-batch-size", "16"], ["--max-batch-size 16", "32", "digits"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "-1"], ["--lr", "at least 0", "-1"]),
        (["--controller.growth-factor", "1"], ["--controller absa: growth_factor", "> 1, got 1"]),
        (["--adversary.share", "1.5"], ["--adversary fgsm: share", "[0, 1]", "1.5"]),
        (["--adversary.eps", "-0.1"], ["--adversary fgsm: eps", "at least 0", "-0.1"]),
        (
            ["--adversary", "conadv", "--adversary.staleness", "-1"],
            ["--adversary conadv: staleness", ">= 0", "-1"],
        ),
        (
            ["--adversary", "conadv", "--adversary.runner", "stream", "--device", "cpu"],
            ["--adversary.runner stream cannot attack on cpu"],
        ),
        (
            ["--adversary.staleness", "1"],
            ["--adversary.staleness is an option of conadv, not of fgsm", "--adversary conadv"],
        ),
        (
            ["--staleness", "1"],
            ["unknown option --staleness", "--adversary.staleness with --adversary conadv"],
        ),
        (
            ["--adversary", "conadv", "--adversary.staleness", "9999"],
            ["staleness must be smaller than the number of steps"],
        ),
        (
            ["--optimizer", "sam", "--optimizer.rho", "-1"],
            ["--optimizer sam: rho", ">= 0", "-1"],
        ),
        (
            ["--optimizer", "sam", "--optimizer.rho", "0.1", "--precision", "fp16"],
            ["SAM", "bf16"],
        ),
        (
            ["--schedule.milestones", "[5, 2]"],
            ["--schedule multistep: milestones", "increasing", "[5, 2]"],
        ),
        (
            ["--controller", "adabatch", "--controller.every-epochs", "0"],
            ["--controller adabatch: every_epochs", ">= 1", "0"],
        ),
        (
            ["--controller", "timed", "--controller.stages", "[[1, 600]]"],
            ["--controller.stages reach 600", "--max-batch-size 512"],
        ),
        (
            ["--controller", "timed", "--controller.stages", "[1, 64]"],
            ["--controller.stages: expected list, got 1"],
        ),
        (
            ["--controller", "timed", "--controller.stages", "[[2, 64], [2, 128]]"],
            ["--controller timed: stages must have increasing epochs, got [2, 2]"],
        ),
        (
            ["--controller", "critical", "--controller.edge-share", "1"],
            ["--controller critical: momentum and edge_share must be < 1", "1.0"],
        ),
        (
            [
                "--controller",
                "critical",
                "--controller.edge-share",
                "null",
                "--controller.loss-power",
                "null",
            ],
            ["--controller critical: loss_power and edge_share must not both be None"],
        ),
        (
            ["--controller", "critical", "--lr-rule", "sqrt"],
            ["--lr-rule sqrt", "--controller.edge-share null"],
        ),
        (
            ["--controller", "critical", "--norm-mode", "eval"],
            ["--norm-mode eval", "--controller.edge-share null"],
        ),
        (
            ["--controller", "critical", "--controller.excess-power", "2"],
            ["--controller critical: excess_power", "<= 1", "2"],
        ),
        (
            ["--schedule", "cooldown", "--schedule.decay-from", "9", "--epochs", "9"],
            ["--schedule cooldown: decay_from must lie below the 9 epochs", "got 9"],
        ),
        (
            ["--schedule", "cooldown", "--schedule.decay-from", "30"],
            ["--schedule cooldown: decay_from must lie below the 30 epochs", "got 30"],
        ),
        (
            ["--schedule", "cooldown", "--controller", "timed"],
            ["--controller timed: it decays by itself"],
        ),
        (
            ["--optimizer", "lars", "--optimizer.trust-coefficient", "-1"],
            ["--optimizer lars: trust_coefficient", ">= 0", "-1"],
        ),
        (["--curvature", "off"], ["--controller absa needs curvature"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
        (["--device", "toaster"], ["--device toaster"]),
        (["--data", "cifar10"], ["--data-dir"]),
        (["--data", "cifar10", "--data-dir", "nowhere"], ["nowhere"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
        (["--run-dir", "file/run"], ["cannot write run directory file/run"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], words: list[str], tmp_path: Path, capsys
):
    (tmp_path / "file").write_text("")
    status, out, err = run("train", *arguments, capsys=capsys)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("hessianflow train: error: ")
    for word in words:
        assert word in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "nothing may be written"


def test_only_a_model_with_batch_normalisation_can_be_split(tmp_path: Path, capsys, monkeypatch):
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(input_size**2, num_classes))"
    code = (
        "from torch import nn\n\ndef net(num_classes=10, input_size=8, in_channels=1):\n    return"
        f" {layers}\n"
    )
    (tmp_path / "unnormalised.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--adversary", "conadv", "--model", "unnormalised:net", *QUICK]
    status, _, err = run("train", *options, "--split-norm", "true", capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    assert "needs a model with batch normalisation, found none" in err
    # left open: split only where that is possible
    status, _, err = run("train", *options, capsys=capsys)
    assert status == 0, err


@pytest.mark.slow
def test_what_was_trained_with_twins_is_measured_with_the_main_set_alone(capsys):
    options = ["--adversary", "conadv", "--adversary.staleness", "0", "--run-dir", "twins", *QUICK]
    assert run("train", *options, capsys=capsys)[0] == 0
    _, parts = load_parts("twins")
    assert not any("adversarial" in name for name, _ in parts.model.named_parameters())
    batch = parts.test.examples(torch.arange(parts.test.num_examples))
    accuracy = (parts.model.eval()(batch[0]).argmax(1) == batch[1]).double().mean().item()
    assert accuracy == pytest.approx(History.load("twins").summary["final_accuracy"])
    status, out, _ = run("second-opinion", "twins", "--examples", "16", "--k", "1", capsys=capsys)
    assert status == 0
    # as it would with parameters that the loss does not depend on
    assert "eigenvalues() failed" not in out


@pytest.mark.slow
def test_robustness_and_input_curvature_are_recorded_when_asked_for(capsys):
    status, _, err = run(
        "train", *QUICK, "--overfitting-alarm", "true", "--input-curvature", "true", capsys=capsys
    )
    assert status == 0, err
    (folder,) = Path("runs").iterdir()
    history = History.load(folder)
    epochs = [row["epoch"] for row in history.epochs]
    robustness, curvature = history.of_kind("robustness"), history.of_kind("input-curvature")
    assert [row["epoch"] for row in robustness] == [row["epoch"] for row in curvature] == epochs
    assert all(0 <= row["pgd_accuracy"] <= row["fgsm_accuracy"] + 0.1 for row in robustness)
    assert all(row["eigenvalue"] > 0 and 0 < row["matvecs"] <= 60 for row in curvature)
    assert run("train", *QUICK, "--run-dir", "plain", capsys=capsys)[0] == 0
    assert not History.load("plain").of_kind("robustness")
    assert not History.load("plain").of_kind("input-curvature")


def test_truncated_data_file_is_named_with_its_size(tmp_path: Path, capsys):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"\0" * 3073)
    status, _, err = run("train", "--data", "cifar10", "--data-dir", str(tmp_path), capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    for word in ("data_batch_1.bin", "3073", "30730000"):
        assert word in err.replace(",", "")


def test_config_file_gives_settings_and_refuses_unknown_keys(tmp_path: Path, capsys):
    (tmp_path / "good.yaml").write_text(
        "epochs: 2\nbatch_size: 48\nplots: false\nschedule: {name: multistep, milestones: [1]}\n"
    )
    status, _, _ = run(
        "train", "--config", "good.yaml", "--run-dir", "run", "--lr", "0.02", capsys=capsys
    )
    assert status == 0
    settings = History.load("run").config["settings"]
    assert (settings["epochs"], settings["batch_size"], settings["lr"]) == (2, 48, 0.02)
    assert settings["schedule"]["milestones"] == [1]
    (tmp_path / "bad.yaml").write_text("epochs: 2\nbatchsize: 48\n")
    status, _, err = run("train", "--config", "bad.yaml", capsys=capsys)
    assert status == 2
    assert "batchsize" in err
    assert err.count("\n") == 1


def test_used_run_directory_is_refused(capsys):
    assert run("train", *QUICK, "--run-dir", "run", capsys=capsys)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    status, _, err = run("train", *QUICK, "--run-dir", "run", capsys=capsys)
    assert status == 2
    assert "already holds a run" in err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_resume_of_a_finished_run_changes_nothing(capsys):
    assert run("train", *QUICK, "--run-dir", "run", capsys=capsys)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    status, out, _ = run("resume", "run", capsys=capsys)
    assert (status, out) == (0, "run has finished already: nothing to resume\n")
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_settings_of_a_run_are_a_config_file(capsys):
    assert run("train", *QUICK, "--lr", "0.03", "--run-dir", "run", capsys=capsys)[0] == 0
    again = ["--config", "run/settings.yaml", "--run-dir", "again"]
    assert run("train", *again, capsys=capsys)[0] == 0
    first, second = (History.load(name).config["settings"] for name in ("run", "again"))
    assert {k: v for k, v in first.items() if k != "run_dir"} == {
        k: v for k, v in second.items() if k != "run_dir"
    }
    assert (
        History.load("run").epochs[-1]["train_loss"]
        == History.load("again").epochs[-1]["train_loss"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--controller", "abs"],
        ["--controller", "warmup", "--max-batch-size", "64"],
        ["--controller", "adabatch", "--controller.every-epochs", "1"],
        ["--controller", "timed"],
        ["--controller", "grow-instead-of-decay", "--controller.milestones", "[1]"],
        ["--controller", "noise-scale"],
        ["--controller", "cabs"],
        ["--controller", "divebatch"],
        ["--controller", "critical"],
        ["--optimizer", "adam", "--lr", "0.001"],
        ["--optimizer", "adamw", "--lr", "0.001"],
        ["--optimizer", "lars", "--optimizer.trust-coefficient", "0.003"],
        ["--optimizer", "clars"],
        ["--optimizer", "lamb", "--lr", "0.01"],
        ["--adversary", "pgd"],
        ["--adversary", "conadv", "--adversary.staleness=2", "--adversary.combine=average"],
        ["--adversary", "conadv", "--adversary.attack", "pgd", "--split-norm", "false"],
        ["--adversary", "conadv", "--adversary.runner", "process"],
        ["--adversary", "reuse"],
        ["--optimizer", "sam", "--optimizer.rho", "0.05"],
        ["--optimizer", "extrapolation", "--optimizer.lookahead-lr", "0.01"],
        ["--schedule", "cosine", "--warmup-epochs", "1"],
        ["--schedule", "cooldown"],
        ["--schedule", "cooldown", "--schedule.decay-from", "1", "--warmup-epochs", "0.5"],
        ["--schedule", "polynomial", "--lr-rule", "sqrt", "--max-lr-factor", "3"],
        ["--precision", "bf16", "--channels-last", "true"],
        ["--train-examples", "500", "--test-examples", "100", "--max-batch-size", "400"],
    ],
    ids=" ".join,
)
def test_every_choice_trains_under_its_own_name(arguments: list[str], capsys):
    status, _, err = run("train", *QUICK, *arguments, "--run-dir", "run", capsys=capsys)
    assert status == 0, err
    history = History.load("run")
    assert history.summary["final_accuracy"] > 0.3
    trainer = history.config["trainer"]
    if arguments[0] == "--optimizer":
        assert trainer["optimizer"].lower() == arguments[1]
    if arguments[0] == "--controller" and arguments[1] != "abs":
        name = arguments[1].replace("-", "")
        assert trainer["controller"].lower() in (name, f"{name}batch", f"{name}schedule")


def test_grow_instead_of_decay_does_not_decay_too(capsys):
    options = ["--controller", "grow-instead-of-decay", "--controller.milestones=[1]", *QUICK]
    assert run("train", *options, "--run-dir", "run", capsys=capsys)[0] == 0
    assert [(r["batch_size"], r["lr"]) for r in History.load("run").epochs] == [
        (32, 0.05),
        (160, 0.05),
    ]
    status, _, err = run("train", *options, "--schedule", "multistep", capsys=capsys)
    assert status == 2
    assert "--controller grow-instead-of-decay: it replaces --schedule multistep" in err


def test_a_replay_leaves_the_end_of_another_schedule_out(capsys):
    """A decay that timed never reaches is no error of the controller replayed, which nobody told of
    it."""
    options = [
        "--controller",
        "timed",
        "--controller.stages",
        "[[1, 64]]",
        "--controller.decay-from",
        "2",
        "--run-dir",
        "run",
    ]
    assert run("train", *QUICK, *options, capsys=capsys)[0] == 0
    for controller in ("critical", "timed"):
        status, out, err = run("replay", "run", "--controller", controller, capsys=capsys)
        assert (status, err) == (0, "")
        assert f"{controller}: " in out


def test_a_replay_leaves_the_rate_rule_of_another_controller_out(capsys):
    options = [
        "--controller",
        "fixed",
        "--lr-rule",
        "sqrt",
        "--curvature",
        "epoch",
        "--run-dir",
        "run",
    ]
    assert run("train", *QUICK, *options, capsys=capsys)[0] == 0
    status, out, err = run("replay", "run", "--controller", "critical", capsys=capsys)
    assert (status, err) == (0, "")
    assert "critical: " in out


@pytest.mark.slow
def test_commands_that_read_runs(capsys):
    for seed in ("0", "1"):
        assert (
            run("train", *QUICK, "--seed", seed, "--run-dir", f"run{seed}", capsys=capsys)[0] == 0
        )
    status, out, _ = run("compare", "run0", "run1", "--out", "cmp", capsys=capsys)
    assert status == 0
    assert out.startswith("| settings | runs |")
    assert {p.name for p in Path("cmp").iterdir()} == {"compare.md", "compare.csv", "compare.png"}
    status, out, _ = run("report", "run0", capsys=capsys)
    assert status == 0
    assert Path("run0/report.html").read_text().startswith("<!doctype html>")
    status, out, _ = run("replay", "run0", "--controller.patience", "1", capsys=capsys)
    assert status == 0
    assert "epoch   1: batch 64, rate x 2" in out
    assert "no growth for 1 estimate" in out
    for controller, words in (
        ("critical", "note: the run measured with norm_mode 'eval'; critical means eigenvalues"),
        ("timed", "epoch   1: batch 256, rate x 8, adversarial share 0.2: planned"),
        # 512 examples in 16 batches of 32, then in 4 of 160
        ("grow-instead-of-decay", "grow-instead-of-decay: 20 updates; the run itself took"),
    ):
        status, out, err = run("replay", "run0", "--controller", controller, capsys=capsys)
        assert (status, err) == (0, "")
        assert words in out
    status, out, _ = run(
        "spectrum",
        "run0",
        "--k",
        "2",
        "--trace",
        "true",
        "--density",
        "true",
        "--examples",
        "64",
        capsys=capsys,
    )
    assert status == 0
    found = json.loads(Path("run0/spectrum.json").read_text())
    assert len(found["eigenvalues"]) == 2
    assert found["num_examples"] == 64
    assert Path("run0/plots/spectral_density.png").exists()
    for words in (
        "share below 0 ",
        "share not told from 0 ",
        "share above 0 ",
        "not told from 0: between",
    ):
        assert words in out
    status, out, _ = run(
        "spectrum",
        "run0/checkpoints/best.pt",
        "--k",
        "1",
        "--layers",
        "0",
        "--examples",
        "64",
        "--out",
        "s",
        capsys=capsys,
    )
    assert status == 0
    assert "eigenvalue 1" in out
    status, _, err = run("spectrum", "nowhere", capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "neither a run directory nor a checkpoint" in err


def test_robustness(capsys):
    assert run("train", *QUICK, "--run-dir", "run", capsys=capsys)[0] == 0
    options = ["--attack", "fgsm", "pgd3", "--eps", "0", "0.3", "--examples", "100"]
    status, out, err = run("robustness", "run", *options, capsys=capsys)
    assert status == 0, err
    found = json.loads(Path("run/robustness.json").read_text())["accuracy"]
    clean = found["clean"][0][0]
    # eps 0 changes nothing
    assert found["fgsm"][0][0] == found["pgd3"][0][0] == found["clean"][1][0] == clean
    assert found["worst"][1][0] <= min(found["fgsm"][1][0], found["pgd3"][1][0]) < clean - 0.2
    assert f"{clean:.2%}" in out
    assert Path("run/plots/robustness.png").stat().st_size > 5000
    for bad, words in (
        (["--attack", "pgd"], "such as pgd20"),
        (["--eps", "2"], "--eps must lie between 0 and 1"),
    ):
        status, _, err = run("robustness", "run", *bad, capsys=capsys)
        assert (status, err.count("\n")) == (2, 1)
        assert words in err


def test_data_verify(tmp_path: Path, capsys):
    status, out, _ = run("data", "verify", "cifar10", "--data-dir", str(tmp_path), capsys=capsys)
    assert status == 2
    assert out.startswith("missing")
    status, _, err = run("data", "fetch", "nothing", "--data-dir", str(tmp_path), capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)


def test_version(capsys):
    status, out, _ = run("--version", capsys=capsys)
    assert (status, out.split()[0]) == (0, "hessianflow")


@pytest.mark.parametrize("command", ["resume", "plot"])
def test_no_run_there(command: str, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    status, _, err = run(command, "empty", capsys=capsys)
    assert status == 2
    assert err == f"hessianflow {command}: error: empty is not a run directory: it holds no " + (
        "config.json\n" if command == "resume" else "history.jsonl\n"
    )


def test_corrupt_and_foreign_checkpoints_are_refused(capsys):
    assert run("train", *QUICK, "--run-dir", "run", capsys=capsys)[0] == 0
    checkpoints = Path("run/checkpoints")
    (checkpoints / "previous.pt").unlink()
    Path("run/summary.json").unlink()  # as if it had been interrupted
    history = Path("run/history.jsonl").read_bytes()
    (checkpoints / "last.pt").write_bytes(b"rubbish")
    status, _, err = run("resume", "run", capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "last.pt (7 bytes) cannot be read: damaged or foreign" in err
    torch.save({"weights": torch.ones(1)}, checkpoints / "last.pt")
    status, _, err = run("resume", "run", capsys=capsys)
    assert status == 2
    assert "not a hessianflow checkpoint" in err
    assert Path("run/history.jsonl").read_bytes() == history


def test_divergence_names_epoch_step_and_checkpoint(capsys):
    status, _, err = run("train", *QUICK, "--lr", "1e30", "--run-dir", "run", capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(r"not finite, or exploded, in epoch 1 at update \d", err)
    assert "last good checkpoint is run/checkpoints/last.pt" in err
    assert History.load("run").of_kind("event")[0]["event"] == "diverged"


@pytest.mark.slow
def test_statistics_of_all_ranks_are_those_of_one_alone(capsys):
    """Without torchrun the synchronised layers see the microbatch, as plain ones do."""
    options = [*QUICK, "--train-examples", "200", "--microbatch-size", "32"]
    for name, group in (("synchronised", "ranks"), ("plain", "0")):
        assert (
            run("train", *options, "--norm-batch-size", group, "--run-dir", name, capsys=capsys)[0]
            == 0
        )
    losses = [
        [row["train_loss"] for row in History.load(name).epochs]
        for name in ("synchronised", "plain")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_plot_overlays_runs(capsys):
    for seed in ("0", "1"):
        assert (
            run("train", *QUICK, "--seed", seed, "--run-dir", f"run{seed}", capsys=capsys)[0] == 0
        )
    status, out, _ = run("plot", "run0", "run1", "--out", "pictures", capsys=capsys)
    assert status == 0
    assert Path("pictures/curvature_trajectory.png").stat().st_size > 10_000
    assert "pictures/training_curves.png" in out


def synthetic_run(name: str, *rows: dict, **config: object) -> Path:
    """A run directory as training from Python leaves one, without weights."""
    folder = Path(name)
    folder.mkdir(parents=True)
    first = {"kind": "epoch", "epoch": 1, "examples": 64, "updates": 2, "batch_size": 32, "lr": 0.1}
    first |= {"train_loss": 1.5, "eval_accuracy": 0.5}
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (first, *rows)))
    (folder / "config.json").write_text(
        json.dumps({"trainer": {"examples_per_epoch": 64}, **config})
    )
    return folder


def test_a_run_named_twice_counts_once(capsys):
    run_dir = synthetic_run("k/fixed")
    status, out, err = run(
        "compare", "k/fixed", f"{run_dir.resolve()}", "k/../k/fixed/", capsys=capsys
    )
    assert status == 0
    assert "| fixed (1 unfinished) | 1 | 50.00 | 2 | 64 |" in out
    assert err.count("is named more than once and counts once\n") == err.count("\n") == 2


@pytest.mark.parametrize("command", ["replay", "compare", "plot", "report"])
def test_a_value_that_is_no_number_is_one_line(command: str, capsys):
    row = {"kind": "curvature", "epoch": 1, "examples": 64, "updates": 2, "eigenvalue": "big"}
    synthetic_run("run", row, settings={})
    status, _, err = run(command, "run", capsys=capsys)
    assert status == 2
    words = (
        'run/history.jsonl line 2: eigenvalue must be a number or null, got "big": the file is'
        " damaged; delete the "
    )
    assert err.startswith(f"hessianflow {command}: error: {words}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        (["replay", "run"], "hf.control.replay"),
        (["spectrum", "run"], "hf.curvature.top_eigenpairs"),
        (["second-opinion", "run"], "hf.curvature.second_opinion"),
        (["robustness", "run"], "hf.adversarial.robust_accuracy"),
        (["critical-batch", "run"], "hf.planning.branch"),
        (["plan", "--run", "run"], "hf.planning.predict"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_made_from_python_is_refused_with_what_to_call(
    command: list[str], instead: str, capsys
):
    synthetic_run("run")
    status, _, err = run(*command, capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    needs = (
        f"run/config.json holds no settings: `hessianflow {command[0]}` needs a run of `hessianflow"
        " train`"
    )
    assert f"{needs}; with one made from Python, call {instead}" in err
    room, name = instead.removeprefix("hf.").split(".")
    assert callable(getattr(getattr(hessianflow, room), name))


def test_a_batch_that_shrank_is_told(capsys):
    """cabs halves the batch of 32 within the first epoch."""
    status, out, _ = run(
        "train", *QUICK, "--epochs", "1", "--controller", "cabs", "--run-dir", "run", capsys=capsys
    )
    assert status == 0
    assert "largest batch 32" in out
    assert re.search(r"\n  epoch   0: batch 32 -> 16: rate ", out)


def test_an_interrupt_is_one_line_and_status_130(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessianflow.commands.curvature._load", interrupted)
    status, out, err = run("spectrum", "run", capsys=capsys)
    assert (status, out, err) == (130, "", "hessianflow: interrupted\n")


def test_an_interrupt_while_the_command_loads_is_one_line():
    """It comes when jsonargparse is looked for, long before there is a parser."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jsonargparse': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from hessianflow.cli import main\n"
        "sys.exit(main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hessianflow: interrupted\n")


def test_help_and_no_command(capsys):
    assert "train" in run(capsys=capsys)[1]
    status, out, _ = run("train", "--help", capsys=capsys)
    assert status == 0
    assert "Examples per optimizer step at the start" in " ".join(out.split())


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hessianflow", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def final_weights(run_dir: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(run_dir) / "checkpoints" / "last.pt", weights_only=True)["model"]


def wait_for_epochs(run_dir: str, epochs: int) -> None:
    """Until history.jsonl holds so many completed epochs (the process under test writes it)."""
    deadline = time.monotonic() + 60
    path = Path(run_dir) / "history.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count('"kind": "epoch"') >= epochs:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {epochs} epochs within 60 s")


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_is_bit_equal(capsys):
    """SIGKILL twice, at moments nobody chose; weights and records end as in the uninterrupted
    run."""
    options = ["--epochs", "8", "--plots", "false", "--checkpoint-examples", "200"]
    assert run("train", *options, "--run-dir", "whole", capsys=capsys)[0] == 0
    moment = random.Random(os.getpid())
    process = start("train", *options, "--run-dir", "run")
    wait_for_epochs("run", 1)
    time.sleep(moment.uniform(0, 0.5))
    process.kill()
    process.communicate()
    process = start("resume", "run")
    wait_for_epochs("run", 3)
    time.sleep(moment.uniform(0, 0.5))
    process.kill()
    process.communicate()
    assert run("resume", "run", capsys=capsys)[0] == 0
    expected = final_weights("whole")
    for name, value in final_weights("run").items():
        assert torch.equal(value, expected[name]), name

    def rows(folder: str):
        return [
            {k: v for k, v in r.items() if "second" not in k} for r in History.load(folder).records
        ]

    assert rows("run") == rows("whole")


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_as_preempted(capsys):
    process = start("train", "--epochs", "200", "--plots", "false", "--run-dir", "run")
    wait_for_epochs("run", 1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "preempted" in out
    history = History.load("run")
    assert history.summary["status"] == "preempted"
    assert (
        torch.load("run/checkpoints/last.pt", weights_only=True)["examples"]
        == history.summary["examples"]
    )
