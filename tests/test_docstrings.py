"""Every example in a docstring of the package runs as it stands and prints what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "hessianflow").rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if ">>>" in path.read_text("utf-8")
]


def test_there_are_examples() -> None:
    assert "hessianflow.curvature.hessian" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0, capsys.readouterr().out
