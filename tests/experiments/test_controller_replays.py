"""The recorded runs of our controller, replayed: today's code makes the decisions that they were
trained with."""

from typing import Any

import pytest

from experiments.controllers.replays import RESULTS, history
from experiments.results import read_rows
from hessianflow.choices import build_controller
from hessianflow.config import from_dict
from hessianflow.control import replay
from hessianflow.resolve import resolve
from hessianflow.upgrade import upgrade

ROWS = [row for row in read_rows(RESULTS) if row["method"] in ("critical", "critical-reuse")]


def test_there_are_runs_of_ours() -> None:
    assert len([row for row in ROWS if row["method"] == "critical-reuse"]) >= 17


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['problem']}-{row['method']}-{row['seed']}"
)
def test_a_replay_decides_as_the_run_did(row: dict[str, Any]) -> None:
    epochs = row["epochs"]
    config = resolve(from_dict(upgrade(row["settings"]), row["method"]))
    result = replay(history(row), build_controller(config), total_epochs=len(epochs))
    changes = {step.epoch: step.decision for step in result.changes}
    assert [(growth["epoch"], growth["to"]) for growth in row["growths"]] == [
        (epoch, decision.batch_size) for epoch, decision in changes.items()
    ]
    assert all(growth["reason"] == changes[growth["epoch"]].reason for growth in row["growths"])
