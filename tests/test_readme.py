"""Every Python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("source", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_readme_has_the_two_commands():
    text = README.read_text()
    assert "pip install -c constraints.txt . && hessianflow train" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text
    assert len(BLOCKS) >= 2
