"""The settings of every recorded run, in the words of today: each makes a run that can be."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.cells import same_words, unfinished  # noqa: E402
from hessianflow.config import from_dict, hints  # noqa: E402
from hessianflow.methods import Choice  # noqa: E402
from hessianflow.resolve import resolve  # noqa: E402
from hessianflow.upgrade import is_older, upgrade  # noqa: E402

STUDIES = (
    "absa_cifar",
    "conadv",
    "controllers",
    "dual_batch",
    "language",
    "spectra",
    "squeezenext",
)
NEW = ("language",)
"""Studies whose rows were all made in the words of today."""
OF_PROGRAMS = {
    "conadv": {"attack_eps", "attack_steps", "attack_examples"},
    "spectra": {"examples", "measured_after", "points", "probes", "steps"},
}
"""Settings of the programs of studies, which no run of `hessianflow train` has."""


def rows(study: str) -> list[dict[str, Any]]:
    """Every line, also those that a later one of the same cell replaces."""
    path = ROOT / "experiments" / study / "results.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_file_of_rows_is_looked_at() -> None:
    found = {path.parent.name for path in (ROOT / "experiments").glob("*/results.jsonl")}
    assert found == set(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_recorded_settings_make_a_run_that_can_be(study: str) -> None:
    for row in rows(study):
        settings = upgrade(row["settings"])
        assert not is_older(settings)
        assert upgrade(settings) == settings
        foreign = settings.keys() - hints().keys()
        assert foreign == OF_PROGRAMS.get(study, set())
        known = {name: value for name, value in settings.items() if name in hints()}
        config = resolve(from_dict(known, f"{study} {row['method']}"))
        check_kept(row["settings"], config)


PLACES = {
    "patience": ("controller", "patience"),
    "edge_share": ("controller", "edge_share"),
    "excess_power": ("controller", "excess_power"),
    "decay_factor": ("controller", "decay_factor"),
    "every_epochs": ("controller", "every_epochs"),
    "stages": ("controller", "stages"),
    "small_workers": ("controller", "small_workers"),
    "extra_time": ("controller", "extra_time"),
    "slope": ("controller", "slope"),
    "milestones": ("schedule", "milestones"),
    "lr_decay": ("schedule", "lr_decay"),
    "adversarial_share": ("adversary", "share"),
    "staleness": ("adversary", "staleness"),
    "trust_coefficient": ("optimizer", "trust_coefficient"),
    "sam_rho": ("optimizer", "rho"),
}


def check_kept(recorded: dict[str, Any], config: Any) -> None:
    """Assert that options that had an effect have the values that were recorded, and so have all
    settings that are where they were."""
    for name, (kind, option) in PLACES.items():
        chosen: Choice = getattr(config, kind)
        if recorded.get(name) is not None and option in chosen.options:
            assert plain(chosen.options[option]) == (recorded[name] or None) or (
                plain(chosen.options[option]) == recorded[name]
            ), name
    for name in ("data", "model", "batch_size", "max_batch_size", "epochs", "lr", "seed"):
        if name in recorded and recorded[name] is not None:
            assert getattr(config, name) == recorded[name]
    for kind in ("controller", "adversary", "schedule"):
        if isinstance(recorded.get(kind), str):
            assert getattr(config, kind).name == recorded[kind]


def plain(value: Any) -> Any:
    return [plain(part) for part in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("study", STUDIES)
def test_rows_in_the_words_of_their_time_count_as_done(study: str) -> None:
    """Every cell of today's grid that has a row under the same settings, whose words are older."""
    folder = ROOT / "experiments" / study
    cells = [
        cell
        for scale in ("cpu", "gpu")
        for cell in import_module(f"experiments.{study}.grid").cells(scale, range(5))
    ]
    recorded = {(row["problem"], row["method"], row["seed"]) for row in rows(study)}
    known = [cell for cell in cells if (cell.problem, cell.method, cell.seed) in recorded]
    assert len(known) >= 6
    assert unfinished(known, folder / "results.jsonl") == []
    assert any(is_older(row["settings"]) for row in rows(study)) or study in NEW


def test_settings_are_compared_in_one_spelling() -> None:
    older = {
        "controller": "abs",
        "adversary": "fgsm",
        "patience": 0,
        "milestones": [2],
        "lr": None,
        "data": "fake",
    }
    today = {
        "controller": {"name": "abs", "patience": None},
        "adversary": {"name": "none"},
        "schedule": {"name": "multistep", "milestones": (2,)},
        "data": "fake",
    }
    assert same_words(older) == same_words(today)
    assert same_words(older) != same_words({**today, "adversary": "pgd"})
    assert same_words({"optimizer": {"name": "sam", "base": {"name": "adam"}}}) == {
        "optimizer": {"name": "sam", "base": "adam"}
    }
