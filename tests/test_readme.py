"""Every Python block of README.md and experiments/README.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SPREAD = True
BLOCKS, FURTHER = (
    re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for page in (README, ROOT / "experiments" / "README.md")
)


@pytest.mark.slow
@pytest.mark.parametrize("source", BLOCKS + FURTHER, ids=range(len(BLOCKS + FURTHER)))
def test_python_block_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    torch.manual_seed(0)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_readme_has_the_two_commands():
    text = README.read_text()
    assert "pip install -c constraints.txt . && hessianflow train" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text
    assert len(BLOCKS) >= 2
    assert len(FURTHER) >= 2
