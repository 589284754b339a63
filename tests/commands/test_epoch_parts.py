"""Passes over the data that are divided into parts by the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from hessianflow.cli import main

SHORT = ("--data", "digits", "--train-examples", "256", "--test-examples", "32")
QUIET = ("--plots", "false", "--adversary", "none", "--curvature", "off")


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def train(run_dir: Path, *options: str) -> int:
    return main(["train", "--run-dir", str(run_dir), *SHORT, *QUIET, *options])


def test_a_run_of_one_pass_grows(tmp_path: Path) -> None:
    """There are eight parts of 32 examples; the batch grows from 8 after every second part."""
    controller = ("--controller", "adabatch", "--controller.every-epochs", "2")
    run_dir = tmp_path / "run"
    sizes = ("--batch-size", "8", "--max-batch-size", "32")
    assert train(run_dir, *controller, *sizes, "--epochs", "1", "--epoch-parts", "8") == 0
    epochs = rows(run_dir, "epoch")
    assert [row["epoch"] for row in epochs] == list(range(1, 9))
    assert [row["examples"] for row in epochs] == [32 * part for part in range(1, 9)]
    assert [row["batch_size"] for row in epochs] == [8, 8, 16, 16, 32, 32, 32, 32]
    assert json.loads((run_dir / "config.json").read_text())["trainer"]["every_examples"] == 32
    assert main(["replay", str(run_dir), "--controller", "fixed"]) == 0
    assert main(["report", str(run_dir)]) == 0


def test_the_rate_falls_within_the_pass(tmp_path: Path) -> None:
    """The rate falls in a straight line to 0 over the pass, whatever the number of parts."""
    options = ("--controller", "fixed", "--schedule", "polynomial", "--schedule.power", "1")
    for parts in ("4", "8"):
        run_dir = tmp_path / parts
        assert (
            train(run_dir, *options, "--batch-size", "8", "--epochs", "1", "--epoch-parts", parts)
            == 0
        )
        rates = [row["lr"] for row in rows(run_dir, "epoch")]
        assert rates == sorted(rates, reverse=True)
        # The last of 32 steps is taken at 1/32 of the first rate, the first step at all of it.
        first = json.loads((run_dir / "config.json").read_text())["settings"]["lr"]
        assert rates[-1] == pytest.approx(first / 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epoch-parts", "0"), "epoch"),
        (("--epoch-parts", "2", "--controller", "dual-batch"), "--epoch-parts"),
        (("--epoch-parts", "2", "--resolution", "cyclic"), "--epoch-parts"),
        (
            ("--epoch-parts", "100", "--batch-size", "8"),
            "parts of a pass: lower it",
        ),
    ],
)
def test_parts_that_cannot_be_counted_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
