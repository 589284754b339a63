"""What the command says while it trains, and the TensorBoard files it writes when asked."""

import logging
from pathlib import Path

import pytest
import torch

from hessianflow import History
from hessianflow.cli import main

QUICK = ["--epochs", "3", "--controller.patience", "1", "--plots", "false", "--run-dir", "run"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def errors(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error of a command that succeeds."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().err.splitlines()


def test_log_level_info_tells_epochs_and_decisions(capsys):
    lines = errors("train", *QUICK, "--log-level", "info", capsys=capsys)
    told = [
        line for line in lines if not line.startswith("hessianflow: statistics")
    ]  # short runs need not have settled
    assert [line.split(",")[0] for line in told] == [
        "hessianflow: epoch 1: batch 32 -> 64",
        "hessianflow: epoch 1: batch 32",
        "hessianflow: epoch 2: batch 64 -> 128",
        "hessianflow: epoch 2: batch 64",
        "hessianflow: epoch 3: batch 128",
    ]


def test_quiet_where_nobody_watches_and_the_logger_is_left_as_found(capsys):
    assert errors("train", *QUICK, capsys=capsys) == []
    logger = logging.getLogger("hessianflow")
    assert (logger.level, logger.handlers, logger.propagate) == (logging.NOTSET, [], True)


@pytest.mark.slow
def test_debug_adds_readings(capsys):
    lines = errors("train", *QUICK, "--log-level", "debug", capsys=capsys)
    assert sum("eigenvalue" in line and "products" in line for line in lines) == 3


def test_unknown_level_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--log-level", "loud"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--log-level" in err


@pytest.mark.slow
def test_a_fallback_is_said_on_stderr_whatever_the_place(capsys):
    """A truncated newest checkpoint: one line names it and the file that was used in its place."""
    assert errors("train", *QUICK, capsys=capsys) == []
    Path("run/summary.json").unlink()  # as if it had been interrupted
    last = Path("run/checkpoints/last.pt")
    last.write_bytes(last.read_bytes()[:2000])
    [line] = errors("resume", "run", capsys=capsys)
    assert line.startswith(
        "hessianflow: fallback: checkpoint run/checkpoints/last.pt (2000 bytes) cannot be read"
    )
    assert line.endswith("continuing from previous.pt")
    assert History.load("run").summary["status"] == "finished"


def test_tensorboard_files_hold_the_history(capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    errors("train", *QUICK, "--tensorboard", "true", capsys=capsys)
    events = EventAccumulator("run/tensorboard").Reload()
    for tag in ("eval_accuracy", "train_loss", "batch_size"):
        shown = [(e.step, e.value) for e in events.Scalars(f"epoch/{tag}")]
        assert shown == [
            (row["examples"], pytest.approx(row[tag])) for row in History.load("run").epochs
        ]
    assert len(events.Scalars("curvature/eigenvalue")) == 3


@pytest.mark.slow
def test_curvature_is_measured_on_fewer_examples_where_it_costs_more(capsys):
    errors(
        "train", "--data", "fake", *QUICK, "--train-examples", "256", "--epochs", "1", capsys=capsys
    )
    assert History.load("run").config["settings"]["probe_examples"] == 64
    assert History.load("run").curvature[0]["num_examples"] == 64


@pytest.mark.slow
def test_a_curvature_budget_is_kept(capsys):
    """Digits: 1438 examples an epoch, a reading on 128. Cost is counted in gradients, 2 a product
    and 1 a graph."""
    errors("train", *QUICK, "--epochs", "8", "--curvature-budget", "0.5", capsys=capsys)
    history = History.load("run")
    spent = [(1 + 2 * row["matvecs"]) * row["num_examples"] for row in history.curvature]
    measured = [row["epoch"] for row in history.curvature]
    assert 1 < len(measured) < 7
    assert measured[0] == 1, "the first is free: nobody knows its price"
    for number, row in list(enumerate(history.curvature))[1:]:
        assert sum(spent[:number]) + spent[number - 1] <= 0.5 * row["examples"]
    assert len(history.growths) == 4, "patience goes on counting epochs"
    told = [row["epoch"] for row in history.of_kind("event") if row["event"] == "budget"]
    assert told == [min({*range(1, 9)} - {*measured})], "once, where the first reading is missing"
    assert main(["train", "--curvature-budget", "0"]) == 2
    assert "--curvature-budget must be at least 1e-06" in capsys.readouterr().err
