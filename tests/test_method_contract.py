"""What every method must keep: a new one is tested by standing in its table.

Each controller, adversary, optimizer and schedule trains, lets the batch grow, goes on bit for bit
from a checkpoint, refuses bad options on one line, and trains on two ranks or says why not.
"""

import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

from hessianflow import HessianFlowError, History, methods
from hessianflow.distributed import GroupReducer, GroupWorld, run_local

TABLES = ("controller", "adversary", "optimizer", "schedule")
METHODS = [(kind, name) for kind in TABLES for name in methods.KINDS[kind].methods]
NAMES = [f"{kind}-{name}" for kind, name in METHODS]
SMALL = ["--train-examples", "96", "--test-examples", "32", "--epochs", "3", "--batch-size", "16"]
SMALL += ["--max-batch-size", "32", "--plots", "false", "--device", "cpu"]
FURTHER: dict[str, dict[str, Any]] = {
    # what a method cannot do without, or what makes it act within three epochs
    "controller-absa": {"patience": 1},
    "controller-abs": {"patience": 1},
    "controller-adabatch": {"every_epochs": 1},
    "controller-timed": {"stages": [[1, 32]]},
    "controller-grow-instead-of-decay": {"milestones": [1]},
    "controller-dual-batch": {"slope": 0.1, "intercept": 1},
    "optimizer-extrapolation": {"lookahead_lr": 0.01},
}
QUICK = ("controller-absa", "controller-critical", "adversary-conadv", "optimizer-lars")
QUICK += ("schedule-multistep",)
"""The methods that the quick tier takes through a run; the slow one takes all others."""
STILL = ("controller-fixed", "controller-warmup", "controller-dual-batch")
"""Their batch never grows, or is planned beforehand."""
GROWING = ("controller-absa", "controller-abs", "controller-adabatch", "controller-timed")
GROWING += ("controller-grow-instead-of-decay",)
"""Their batch grows in this run; that of others may, as gradients or losses decide."""


ALONE = ("adversary-conadv", "adversary-reuse")
"""With their defaults they train in one process only, and say so."""


def words(kind: str, name: str) -> list[str]:
    """Return the options of a small run with one method; the batch grows unless it decides."""
    found = [*SMALL, f"--{kind}", name]
    if kind != "controller":
        found += ["--controller", "adabatch", "--controller.every-epochs", "1"]
    for option, value in FURTHER.get(f"{kind}-{name}", {}).items():
        found += [f"--{kind}.{option.replace('_', '-')}", str(value)]
    return found


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder, "checkpoints", "last.pt"), weights_only=True)["model"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for case, name in zip(METHODS, NAMES, strict=True)
    ],
)
def test_it_trains_grows_and_goes_on_bit_for_bit(
    kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state round trip is that of a real checkpoint: an epoch is lost and made again."""
    status, _, err = run("train", *words(kind, name), "--run-dir", "whole", capsys=capsys)
    assert (status, err) == (0, ""), err
    growths = [(row["from"], row["to"]) for row in History.load("whole").growths]
    if f"{kind}-{name}" in STILL:
        assert growths == []
    elif kind != "controller" or f"{kind}-{name}" in GROWING:
        assert growths == [(16, 32)]
    assert all(16 <= row["batch_size"] <= 32 for row in History.load("whole").epochs)
    shutil.copytree("whole", "cut")
    Path("cut", "summary.json").unlink()
    os.replace("cut/checkpoints/previous.pt", "cut/checkpoints/last.pt")
    assert run("resume", "cut", capsys=capsys)[0] == 0
    whole, again = weights("whole"), weights("cut")
    for part, tensor in whole.items():
        assert torch.equal(tensor, again[part]), part


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=NAMES)
def test_every_option_refuses_what_it_cannot_be_on_one_line(kind: str, name: str) -> None:
    """A value of no type that an option has; and an option that is not there is named, too."""
    options = methods.method_options(methods.KINDS[kind], name)
    for option in [*options, "no_such_option"]:
        with pytest.raises(HessianFlowError) as caught:
            methods.choice(methods.KINDS[kind], {"name": name, option: object()}, kind)
        assert f"--{kind}.{option.replace('_', '-')}" in str(caught.value)
        assert "\n" not in str(caught.value)


def on_two(reducer: GroupReducer, cases: list[dict[str, Any]]) -> list[Any]:
    """Train every case as one rank; the weights, or what is said."""
    build, config, resolve = (
        import_module(f"hessianflow.{name}") for name in ("build", "config", "resolve")
    )
    torch.set_num_threads(1)
    found: list[Any] = []
    for case in cases:
        try:
            settings = resolve.resolve(config.TrainConfig(**case))
            made = build.build_trainer(settings, world=GroupWorld(reducer))
            made.fit()
        except HessianFlowError as error:
            found.append(str(error))
        else:
            parameters = list(made.model.parameters())
            found.append(torch.cat([each.detach().flatten() for each in parameters]))
    return found


@pytest.mark.slow
@pytest.mark.ranks
def test_on_two_ranks_all_have_one_model_or_say_why_not() -> None:
    small: dict[str, Any] = {"train_examples": 32, "test_examples": 16, "epochs": 2}
    small |= {"batch_size": 16, "max_batch_size": 32, "device": "cpu"}
    chosen = [case for case in METHODS if case != ("controller", "dual-batch")]
    options = [{"name": name, **FURTHER.get(f"{kind}-{name}", {})} for kind, name in chosen]
    cases = [{**small, kind: given} for (kind, _), given in zip(chosen, options, strict=True)]
    first, second = run_local(on_two, 2, cases, timeout_seconds=600)
    for (kind, name), mine, other in zip(chosen, first, second, strict=True):
        if f"{kind}-{name}" in ALONE:
            assert mine == other
            assert mine.endswith(" on 2 ranks")
            assert ": use " in mine
        else:
            assert not isinstance(mine, str), mine
            assert torch.equal(mine, other), name
            assert mine.isfinite().all(), name
