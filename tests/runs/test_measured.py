"""What is measured of a run again stands beside what was measured before, and never over it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.documents import read_robustness, read_spectrum
from hessianflow.runs.measured import keep_robustness, keep_spectrum

FUNCTION = {"size": 10, "num_examples": 64, "norm_mode": "eval", "loss": 1.25}


def spectrum(*values: float, **parts: Any) -> dict[str, Any]:
    """A measurement of these eigenvalues; what is not named was not measured."""
    found = {
        **FUNCTION,
        "eigenvalues": list(values),
        "residuals": [0.1] * len(values),
        "converged": True,
    }
    return found | {"trace": None, "density": None, "layers": [], "matvecs": 7} | parts


def layer(name: str, eigenvalue: float) -> dict[str, Any]:
    return {"name": name, "eigenvalue": eigenvalue}


DENSITY = {"nodes": [[0.0, 1.0]], "weights": [[0.5, 0.5]], "negative_mass": 0.0}


def test_parts_of_one_function_are_joined(tmp_path: Path):
    assert (
        keep_spectrum(
            tmp_path, spectrum(5.0, 3.0, trace={"value": 2.0, "stderr": 0.1}, density=DENSITY)
        )
        is None
    )
    again = spectrum(5.0, layers=[layer("a", 1.0), layer("b", 2.0)], loss=1.25001)
    assert keep_spectrum(tmp_path, again) is None
    assert keep_spectrum(tmp_path, spectrum(5.0, 3.0, 1.0, layers=[layer("b", 2.5)])) is None
    kept = read_spectrum(tmp_path)
    assert kept is not None
    assert kept["trace"] == {"value": 2.0, "stderr": 0.1}
    assert kept["density"] == DENSITY
    assert kept["layers"] == [layer("a", 1.0), layer("b", 2.5)]
    assert (kept["eigenvalues"], kept["residuals"]) == ([5.0, 3.0, 1.0], [0.1] * 3)
    assert kept["matvecs"] == 21
    assert [path.name for path in tmp_path.iterdir()] == ["spectrum.json"]


def test_fewer_eigenvalues_do_not_take_the_place_of_more(tmp_path: Path):
    """Unless the more did not converge and the fewer did."""
    keep_spectrum(tmp_path, spectrum(5.0, 3.0, gradient_overlap=[0.5, 0.1], converged=False))
    keep_spectrum(tmp_path, spectrum(5.5, gradient_overlap=[0.6]))
    kept = read_spectrum(tmp_path)
    assert kept is not None
    assert (kept["eigenvalues"], kept["gradient_overlap"], kept["converged"]) == (
        [5.5],
        [0.6],
        True,
    )
    keep_spectrum(tmp_path, spectrum(5.0, 3.0, gradient_overlap=[0.5, 0.1]))
    keep_spectrum(tmp_path, spectrum(5.5, gradient_overlap=[0.6]))
    kept = read_spectrum(tmp_path)
    assert kept is not None
    assert (kept["eigenvalues"], kept["gradient_overlap"]) == ([5.0, 3.0], [0.5, 0.1])


@pytest.mark.parametrize(
    "other",
    [{"num_examples": 32}, {"norm_mode": "batch"}, {"loss": 1.3}, {"loss": None}, {"size": 11}],
    ids=str,
)
def test_another_function_is_kept_apart(other: dict[str, Any], tmp_path: Path):
    first = spectrum(5.0, density=DENSITY)
    keep_spectrum(tmp_path, first)
    moved = keep_spectrum(tmp_path, spectrum(4.0, **other))
    assert moved == tmp_path / "spectrum-1.json"
    assert json.loads(moved.read_text()) == first
    kept = read_spectrum(tmp_path)
    assert kept is not None
    assert kept["density"] is None
    assert keep_spectrum(tmp_path, first) == tmp_path / "spectrum-2.json"


@pytest.mark.parametrize("damaged", ["{", '{"eigenvalues": "x"}', "[1]"])
def test_a_damaged_earlier_file_is_kept_and_in_nobodys_way(damaged: str, tmp_path: Path):
    (tmp_path / "spectrum.json").write_text(damaged)
    assert keep_spectrum(tmp_path, spectrum(4.0)) == tmp_path / "spectrum-1.json"
    assert (tmp_path / "spectrum-1.json").read_text() == damaged
    assert read_spectrum(tmp_path) is not None


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path):
    (tmp_path / "spectrum.json").mkdir()
    with pytest.raises(HessianFlowError, match=r"spectrum.json is not an ordinary file"):
        keep_spectrum(tmp_path, spectrum(4.0))


def robustness(
    *attacks: str, eps: tuple[float, ...] = (0.1,), seed: int = 0, examples: int = 9
) -> dict[str, Any]:
    curves = {name: [[0.5, 0.4, 0.6]] * len(eps) for name in ("clean", *attacks, "worst")}
    return {"eps": list(eps), "examples": examples, "seed": seed, "accuracy": curves}


def test_robustness_gives_way_only_to_what_measures_all_of_it(tmp_path: Path):
    assert keep_robustness(tmp_path, robustness("fgsm")) is None
    assert keep_robustness(tmp_path, robustness("fgsm", "pgd5", eps=(0.1, 0.2))) is None
    for other in (robustness("fgsm"), robustness("fgsm", "pgd5", eps=(0.1, 0.2), seed=1)):
        moved = keep_robustness(tmp_path, other)
        assert moved is not None
        assert json.loads((tmp_path / "robustness.json").read_text()) == other
    first = json.loads((tmp_path / "robustness-1.json").read_text())
    assert first == robustness("fgsm", "pgd5", eps=(0.1, 0.2))
    assert read_robustness(tmp_path) is not None
