"""Every study: the cells of all its scales can be, and its smallest grid runs from a shell."""

import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from experiments import large_batch
from experiments.__main__ import names, run, study
from experiments.absa_cifar.grid import FIFTH
from experiments.results import read_rows
from experiments.runner import Cell, Scale

STUDIES = names()
SPREAD = True


def test_the_studies_are_those_of_the_folder() -> None:
    assert set(STUDIES) == SMOKE.keys()
    for name in STUDIES:
        assert study(name).name == name


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu", "full"])
def test_every_cell_can_be_and_no_two_are_the_same(name: str, scale: Scale) -> None:
    found = study(name).cells(scale, [0, 1])
    assert len({(cell.problem, cell.method, cell.seed) for cell in found}) == len(found) > 0
    for cell in found:
        cell.check()


def cells(caps: Sequence[int]) -> dict[str, Cell]:
    found = large_batch.cells(
        {"toy": {**FIFTH, "model": "resnet20"}}, caps, [0], large_batch.METHODS
    )
    return {cell.method: cell for cell in found}


def test_what_knows_no_cap_runs_once() -> None:
    found = cells([512, 1024])
    assert {"fixed", "absa-512", "absa-1024"} <= found.keys()
    assert "fixed-512" not in found
    assert found["absa-512"].settings["max_batch_size"] == 512
    assert found["fixed"].settings["max_batch_size"] == found["fixed"].settings["batch_size"] == 128


def test_a_fifth_of_the_published_run_keeps_its_proportions() -> None:
    """90 epochs, milestones 30, 60, 80 and patience 10, divided by 5."""
    settings = cells([])["absa"].settings
    assert settings["epochs"] == 18
    assert settings["schedule"]["milestones"] == [6, 12, 16]
    assert settings["controller"] == {"name": "absa", "patience": 2}


SMOKE = {
    "absa_cifar": "fake/*",
    "squeezenext": "fake/absa",
    "lars_clars": "fake-64/clars*",
    "spectra": "fake/batch 128*",
    "conadv": "fake/*conadv-*",
    "dual_batch": "fake-cyclic/*",
    "controllers": "fake/critical-reuse",
    "language": "smoke/muon-seesaw",
}
"""Cells of each smallest grid that no other has the like of: each is a process, with 5 s of a core
for imports."""


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("name", STUDIES)
def test_the_smallest_grid_runs(name: str, tmp_path: Path) -> None:
    """Run the real command on made-up data, each cell in a process of its own."""
    options = ["--smoke", "--jobs", "2", "--runs", str(tmp_path), "--only", SMOKE[name]]
    assert run([name, *options]) == 0
    rows = read_rows(tmp_path / "smoke" / "results.jsonl")
    wanted = [
        cell
        for cell in study(name).cells("smoke", [0])
        if fnmatch(f"{cell.problem}/{cell.method}", SMOKE[name])
    ]
    assert len(rows) == len(wanted) > 0
    assert (tmp_path / "smoke" / "results.png").read_bytes().startswith(b"\x89PNG")
    if name == "controllers":
        assert rows[0]["largest_batch"] > 32
        assert all(epoch["eigenvalue"] for epoch in rows[0]["epochs"][:2])
        assert run([name, *options, "--report"]) == 0


def test_without_a_name_the_studies_are_listed() -> None:
    command = [sys.executable, "-m", "experiments"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in STUDIES:
        assert f"  {name} " in done.stdout
    assert "Does ABSA save updates on CIFAR?" in done.stdout


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("absa-cifar", "did you mean absa_cifar?"), ("zzz", "choose from absa_cifar, conadv,")],
)
def test_an_unknown_study_is_refused_with_a_way_out(
    name: str, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run([name, "--smoke"])
    assert way_out in capsys.readouterr().err
