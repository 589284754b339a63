"""The settings of the dual-batch study against the published ones."""

from pathlib import Path

import pytest
import yaml

from experiments.dual_batch.grid import cells
from experiments.dual_batch.tables import table
from hessianflow.config import from_dict
from hessianflow.control import PUBLISHED, dual_batch_plan
from hessianflow.resolve import resolve

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "dual_batch"


@pytest.mark.parametrize("name", ["cifar100", "imagenet"])
def test_the_files_of_settings_are_the_published_ones(name: str) -> None:
    config = resolve(from_dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), name))
    setting = PUBLISHED[name]
    assert config.resolutions == tuple(level.resolution for level in setting.levels)
    assert config.resolution_batch_sizes == tuple(level.batch_size for level in setting.levels)
    assert config.dropouts == tuple(level.dropout for level in setting.levels)
    controller = config.controller.options
    assert (controller["slope"], controller["intercept"]) == tuple(
        zip(*((t.slope, t.intercept) for t in setting.times), strict=True)
    )
    schedule = config.schedule.options
    assert (*schedule["milestones"], config.epochs) == setting.phase_ends
    assert (config.lr, schedule["lr_decay"]) == (setting.lr, setting.lr_decay)


def test_the_cluster_of_the_study_is_the_published_one_at_a_fifth() -> None:
    found = cells("cpu", [0, 1, 2])
    assert len({(cell.problem, cell.method, cell.seed) for cell in found}) == 54
    setting = PUBLISHED["cifar100"]
    for cell in found:
        cell.check()
        batch_size = cell.settings["batch_size"]
        s = cell.settings["controller"]
        lines = s["slope"], s["intercept"]
        slopes, intercepts = lines if isinstance(s["slope"], list) else ([lines[0]], [lines[1]])
        batches = cell.settings.get("resolution_batch_sizes", [batch_size])
        for level, (slope, intercept, batch) in enumerate(
            zip(slopes, intercepts, batches, strict=True), 2 - len(slopes)
        ):
            here = dual_batch_plan(
                4, s["small_workers"], 10_000, batch, slope, intercept, s["extra_time"]
            )
            there = setting.plan(level, 4, s["small_workers"], s["extra_time"])
            assert here.target_seconds == pytest.approx(there.target_seconds / 5)
            for mine, theirs in zip(here.workers, there.workers, strict=True):
                assert mine.batch_size == pytest.approx(theirs.batch_size / 5, abs=0.6)


def test_every_scale_has_a_grid() -> None:
    assert len(cells("smoke", [0])) == 4
    assert {cell.settings["data"] for cell in cells("full", [0])} == {"cifar100"}


def test_the_table_pairs_seeds_and_kinds() -> None:
    def row(
        method: str, kind: str, seed: int, accuracy: float, seconds: float
    ) -> dict[str, object]:
        return {
            "method": method,
            "problem": f"p-{kind}",
            "seed": seed,
            "accuracy": accuracy,
            "clock_seconds": seconds,
        }

    rows = [
        row("s3-k1.05", "fixed", 1, 0.52, 11.0),
        row("s0", "fixed", 1, 0.50, 10.0),
        row("s0", "fixed", 0, 0.40, 10.0),
    ]
    lines = table([*rows, row("s0", "cyclic", 0, 0.41, 8.5)]).splitlines()[2:]
    assert lines[0] == "| s0 | 45.00 ± 7.07 (2) |  | 10.000 | 41.00 (1) |  | 8.500 | -15.0 % |"
    assert lines[1] == "| s3-k1.05 | 52.00 (1) | +2.00 | 11.000 | not run |  |  |  |"
