"""Optimizers of other packages by `--optimizer package.module:Class`, as their users get them.

The oracle of a run that goes on from a checkpoint is the run that was left alone.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)
from peers import library

from hessianflow import History

SMALL = ["--train-examples", "96", "--test-examples", "32", "--epochs", "3", "--batch-size", "16"]
SMALL += ["--max-batch-size", "32", "--plots", "false", "--device", "cpu", "--lr", "0.01"]
SMALL += ["--controller", "adabatch", "--controller.every-epochs", "1"]

FIRST_ORDER = ["pytorch_optimizer:Shampoo", "pytorch_optimizer:SOAP"]
FIRST_ORDER += ["schedulefree:AdamWScheduleFree", "schedulefree:SGDScheduleFree"]
SECOND_ORDER = ["pytorch_optimizer:AdaHessian", "pytorch_optimizer:SophiaH"]

OWN = '''
import pytorch_optimizer
import torch


def sam(params, lr, rho: float = 0.05):
    """Make a SAM around SGD.

    Args:
        params: the parameters.
        lr: the rate.
        rho: the radius.
    """
    return pytorch_optimizer.SAM(params, torch.optim.SGD, rho=rho, lr=lr, momentum=0.9)
'''


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder, "checkpoints", "last.pt"), weights_only=True)["model"]


@pytest.mark.filterwarnings("ignore")  # warnings inside the packages
@pytest.mark.parametrize("optimizer", FIRST_ORDER + SECOND_ORDER)
def test_it_trains_grows_and_goes_on_bit_for_bit(
    optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Second-order ones draw the signs of their probes from torch's generator, which is kept."""
    library(optimizer.partition(":")[0])
    status, _, err = run(
        "train", *SMALL, "--optimizer", optimizer, "--run-dir", "whole", capsys=capsys
    )
    assert (status, err) == (0, ""), err
    history = History.load("whole")
    assert [(row["from"], row["to"]) for row in history.growths] == [(16, 32)]
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    shutil.copytree("whole", "cut")
    Path("cut", "summary.json").unlink()
    os.replace("cut/checkpoints/previous.pt", "cut/checkpoints/last.pt")
    status, _, err = run("resume", "cut", "--code", optimizer, capsys=capsys)
    assert (status, err) == (0, ""), err
    again = weights("cut")
    for name, tensor in weights("whole").items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.filterwarnings("ignore")
def test_a_sam_that_wants_a_class_is_refused_with_the_way_out_which_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library("pytorch_optimizer")
    chosen = ["train", *SMALL, "--optimizer", "pytorch_optimizer:SAM", "--run-dir", "sam"]
    status, _, err = run(*chosen, capsys=capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "needs base_optimizer, which no option can hold: write a function" in err
    Path("own_sam.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    chosen = [*SMALL, "--optimizer", "own_sam:sam", "--optimizer.rho", "0.1"]
    status, _, err = run("train", *chosen, "--run-dir", "sam", capsys=capsys)
    assert (status, err) == (0, ""), err
    history = History.load("sam")
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    assert history.config["trainer"]["optimizer"] == "SAM"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("pytorch_optimizer:Muon", "--optimizer pytorch_optimizer:Muon: "),
        ("pytorch_optimizer:LookSAM", "needs base_optimizer, which no option can hold"),
        ("schedulefree:ScheduleFreeWrapper", "needs --optimizer.base"),
        ("torch.optim:Muon", "Muon only supports 2D parameters"),
    ],
)
def test_what_cannot_train_the_model_is_refused_on_one_line(
    optimizer: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not optimizer.startswith("torch."):
        library(optimizer.partition(":")[0])
    chosen = ["train", *SMALL, "--optimizer", optimizer, "--run-dir", "none"]
    status, _, err = run(*chosen, capsys=capsys)
    assert (status, err.count("\n")) == (2, 1), err
    assert words in err
