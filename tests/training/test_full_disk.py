"""A disk that fills up: one clear line, nothing half-written in the way, and the run goes on once
there is room.

Fullness is real: the process may write no file beyond a size (RLIMIT_FSIZE), so the operating
system refuses the write in the middle of the file, as it does on a full disk.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, HessianFlowError, History
from hessianflow.runs import Recorder, checkpoints
from hessianflow.runs.files import write_json
from hessianflow.training import Reporting

N = 50


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoint(tmp_path: Path):
    """The one that was there stays, whole; the torn one goes."""
    last = tmp_path / "last.pt"
    checkpoints.save(last, {"n": 1, "x": torch.zeros(10)})
    with (
        files_of_at_most(8192),
        pytest.raises(HessianFlowError, match=r"cannot write checkpoint .*; older ones are"),
    ):
        checkpoints.save(last, {"n": 2, "x": torch.zeros(100_000)})
    assert checkpoints.load(last)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_history_keeps_every_whole_row(tmp_path: Path):
    record = Recorder(tmp_path / "run")
    record.start({})

    def write_many() -> None:
        for number in range(1000):
            record.write({"kind": "measured", "number": number})

    with (
        files_of_at_most(4096),
        pytest.raises(HessianFlowError, match=r"cannot write .*history.jsonl: File too large"),
    ):
        write_many()
    rows = History.load(tmp_path / "run").records
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 90


def test_summary_keeps_the_old_one(tmp_path: Path):
    record = Recorder(tmp_path / "run")
    record.start({})
    record.finish({"status": "preempted"})
    with (
        files_of_at_most(4096),
        pytest.raises(HessianFlowError, match=r"cannot write .*summary.json: File too large"),
    ):
        record.finish({"status": "finished", "filler": "x" * 10_000})
    assert History.load(tmp_path / "run").summary == {"status": "preempted"}
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("part", ["config", "settings"])
def test_a_start_that_failed_leaves_a_directory_that_can_be_used(part: str, tmp_path: Path):
    # config.json holds the settings, too, but a line break takes two bytes there and more in YAML.
    config = {
        "settings": {"filler": "a\n" * 2000},
        "more": "x" * (10_000 if part == "config" else 1),
    }
    record = Recorder(tmp_path / "run")
    with (
        files_of_at_most(8192),
        pytest.raises(HessianFlowError, match=r"cannot write run directory .*File too large"),
    ):
        record.start(config)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    record.start(config)
    assert (tmp_path / "run" / "settings.yaml").stat().st_size > 8192


def test_a_torn_json_file_is_removed(tmp_path: Path):
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "x.json", {"filler": "x" * 1000})
    assert list(tmp_path.iterdir()) == []


def trainer(run_dir: Path | None, **options: Any) -> AdaptiveBatchTrainer:
    torch.manual_seed(0)
    batches = bright_or_dark(N)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings: dict[str, Any] = {
        "epochs": 3,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
    }
    return AdaptiveBatchTrainer(
        model, batches, optimizer=optimizer, run_dir=run_dir, **(settings | options)
    )


def test_a_run_stopped_by_a_full_disk_ends_as_if_it_never_had_been_full(tmp_path: Path):
    """The first checkpoint has no momentum and fits, the next is twice as large and does not."""
    whole = trainer(tmp_path / "whole")
    whole.fit()
    first = (tmp_path / "whole" / "checkpoints" / "previous.pt").stat().st_size
    with (
        files_of_at_most(first - 8000),
        pytest.raises(HessianFlowError, match=r"cannot write checkpoint .*; older ones are"),
    ):
        trainer(tmp_path / "run").fit()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.pt"]
    resumed = trainer(None)
    history = resumed.resume(tmp_path / "run")
    assert history.summary["status"] == "finished"
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]
    vectors = [nn.utils.parameters_to_vector(made.model.parameters()) for made in (whole, resumed)]
    assert torch.equal(*vectors)
