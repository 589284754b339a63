"""The worked example of CONTRIBUTING.md, followed to the letter: files, line, command."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)

from hessianflow import History, control

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
MODULE, TEST = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
(LINE,) = re.findall(r'^ +"(plateau)": (Plateau),$', PAGE.read_text("utf-8"), re.M)


@pytest.fixture
def plateau(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of the example, in the package and in its table as the page says."""
    module = ModuleType("hessianflow.control.plateau")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(MODULE, "plateau.py", "exec"), module.__dict__)
    name, made = LINE
    found: type = getattr(module, made)
    monkeypatch.setitem(control.CONTROLLERS, name, found)
    return found


def test_its_test_passes(plateau: type) -> None:
    names: dict[str, object] = {}
    exec(compile(TEST, "test_plateau.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    for test in tests:
        assert callable(test)
        test()


def test_the_command_trains_with_it_and_its_option(
    plateau: type, capsys: pytest.CaptureFixture[str]
) -> None:
    """No epoch falls by all of the lowest loss: every one but the first grows the batch."""
    options = ["--epochs", "4", "--train-examples", "512", "--test-examples", "64"]
    options += ["--plots", "false", "--run-dir", "run", "--adversary", "none"]
    chosen = ["--controller", "plateau", "--controller.min-fall", "1"]
    status, _, err = run("train", *options, *chosen, capsys=capsys)
    assert (status, err) == (0, "")
    growths = History.load("run").growths
    assert [(row["from"], row["to"]) for row in growths] == [(32, 64), (64, 128)]
    assert growths[0]["reason"].endswith(f"is not 100% below {growths[0]['reason'].split()[-1]}")


def test_its_help_shows_its_options(plateau: type, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("train", "--controller", "plateau", "--help", capsys=capsys)
    assert status == 0
    assert "--controller.min-fall" in out
    assert "share of the lowest loss" in " ".join(out.split())
