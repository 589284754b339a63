"""A language model from the command line: the result in bits per byte, and refusals."""

import json
import math
from pathlib import Path

import pytest
from command_runs import in_a_folder_of_its_own, run

from hessianflow.parts import load_parts

__all__ = ["in_a_folder_of_its_own"]

TRAIN = ["train", "--data", "text", "--data-dir", "books", "--block-length", "16"]
TRAIN += ["--batch-size", "8", "--max-batch-size", "32", "--epochs", "2", "--plots", "false"]
TRAIN += ["--optimizer", "adamw", "--lr", "0.01", "--device", "cpu", "--run-dir", "run"]


@pytest.fixture(autouse=True)
def books(in_a_folder_of_its_own: None) -> None:
    Path("books").mkdir()
    for number in range(8):
        Path(f"books/{number}.txt").write_text(f"{number} is a number. " * 20)


def test_training_prints_nats_and_bits_per_byte(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(*TRAIN, "--controller", "seesaw", capsys=capsys)
    assert status == 0
    records = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    last = [row for row in records if row["kind"] == "epoch"][-1]
    loss = last["eval_loss"]
    assert f"test loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per byte; test acc" in out
    assert last["examples"] == 2 * load_parts("run")[1].train.num_examples
    # Bytes that follow a pattern are learnt: a guess costs 8 bits.
    assert loss / math.log(2) < 6


def test_accuracy_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """The oracle is the share of bytes with the largest score in the trained model."""
    assert run(*TRAIN, "--controller", "fixed", "--curvature", "off", capsys=capsys)[0] == 0
    _, parts = load_parts("run")
    hits = [
        parts.model.eval()(inputs).argmax(dim=1).eq(targets).double()
        for inputs, targets in parts.test
    ]
    found = sum(float(batch.sum()) for batch in hits) / sum(batch.numel() for batch in hits)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["final_accuracy"] == pytest.approx(found, abs=1e-3)


def test_curvature_and_the_critical_batch_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--controller", "fixed", "--curvature-budget", "100", "--probe-examples", "8"]
    assert run(*TRAIN, *words, capsys=capsys)[0] == 0
    records = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [row["eigenvalue"] for row in records if row["kind"] == "curvature"]
    words = ["--epoch", "1", "--batch-sizes", "[4, 8]", "--examples", "16", "--repeats", "1"]
    status, out, err = run("critical-batch", "run", *words, capsys=capsys)
    assert status == 0
    assert "critical" in out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adversary", "fgsm"], "--adversary fgsm changes inputs slightly, but those"),
        (
            ["--model", "resnet20"],
            "--model resnet20 takes images, but --data text is text: use one of gpt",
        ),
        (["--controller", "dual-batch"], "dual-batch trains on images of several sizes, but"),
        (["--input-curvature", "true"], "--input-curvature is a setting of --data digits, fake"),
        (["--overfitting-alarm", "true"], "--overfitting-alarm is a setting of --data digits"),
        (["--resolution", "cyclic"], "--resolution is a setting of --data digits"),
        (["--channels-last", "true"], "--channels-last is a setting of --data digits"),
        (["--data-dir", "nowhere"], "nowhere: no such file or folder; name the text with"),
        (["--data", "python"], "--data-dir does nothing with --data python"),
        (["--block-length", "9999"], "bytes are too few for a block of 9999"),
    ],
)
def test_settings_that_do_not_go_with_text_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(*TRAIN, *words, capsys=capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "text"], "--data text needs --data-dir: name a folder of text"),
        (["--model", "gpt-tiny"], "--model gpt-tiny takes text, but --data digits has images"),
        (["--block-length", "64"], "--block-length is a setting of --data text or python"),
    ],
)
def test_settings_that_only_text_has_are_refused_elsewhere(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run("train", *words, capsys=capsys)
    assert status == 2
    assert message in err


def test_attacks_on_a_trained_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TRAIN, "--controller", "fixed", "--curvature", "off", capsys=capsys)[0] == 0
    status, _, err = run("robustness", "run", capsys=capsys)
    assert status == 2
    assert "bytes, which no attack can change slightly" in err
