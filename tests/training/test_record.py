"""The run directory: what is written, what is read back, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessianflow.interfaces import Decision, HessianFlowError, Progress
from hessianflow.training.record import History, RunRecord
from hessianflow.training.rows import summary
from hessianflow.training.timing import PARTS


def test_rows_are_standard_json_and_come_back(tmp_path: Path):
    record = RunRecord(tmp_path / "run")
    record.start({"settings": {"lr": 0.1}})
    record.write({"kind": "curvature", "eigenvalue": float("nan"), "list": [1.0, float("inf")]})
    record.write({"kind": "batch", "from": 128, "to": 256})
    record.write({"kind": "batch", "from": 256, "to": 256})
    record.finish({"status": "finished"})
    history = History.load(tmp_path / "run")
    assert history.curvature == [{"kind": "curvature", "eigenvalue": None, "list": [1.0, None]}]
    assert history.growths == [{"kind": "batch", "from": 128, "to": 256}]
    assert history.config["settings"] == {"lr": 0.1}
    assert history.config["environment"]["packages"]["torch"]
    assert history.summary == {"status": "finished"}
    assert record.history().records == history.records


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text('{"kind":"epoch","epoch":1}\n{"kind":"epoch","epo')
    assert History.load(tmp_path).epochs == [{"kind": "epoch", "epoch": 1}]


def test_a_damaged_line_in_the_middle_is_reported(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text('{"kind":"epoch"}\nrubbish\n{"kind":"epoch"}\n{"kind":"epoch"}\n')
    with pytest.raises(HessianFlowError, match="line 2 is not JSON"):
        History.load(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"kind":"curvature","epoch":1,"eigenvalue":"big"}', 'eigenvalue must be a number, got "big"'),
        ('{"kind":"epoch","epoch":1,"train_loss":[1]}', "train_loss must be a number, got [1]"),
        ('{"kind":"epoch","epoch":null}', "epoch must be a number, got null"),
        ('{"kind":"batch","from":32,"to":true}', "to must be a number, got true"),
    ],
)
def test_a_value_that_is_no_number_is_reported(tmp_path: Path, row: str, words: str):
    (tmp_path / "history.jsonl").write_text('{"kind":"epoch","epoch":1,"eval_loss":null}\n' + row + "\n")
    with pytest.raises(HessianFlowError, match=re.escape(f"history.jsonl line 2: {words}: the file is damaged")):
        History.load(tmp_path)


def batch_row(examples: int, before: int, after: int) -> dict:
    return {"kind": "batch", "examples": examples, "from": before, "to": after}


@pytest.mark.parametrize(
    ("rows", "examples", "now", "largest"),
    [
        ([], 0, 32, 32),
        ([batch_row(320, 32, 16)], 1438, 16, 32),  # shrank within its first epoch
        ([batch_row(320, 32, 64)], 500, 64, 64),  # interrupted before the epoch ended
        ([batch_row(1438, 32, 64)], 1438, 64, 32),  # decided on when training was over
        ([batch_row(500, 32, 64), batch_row(500, 64, 32)], 1438, 32, 32),  # taken back by a rollback
    ],
)
def test_the_largest_batch_is_one_that_was_trained_with(rows: list[dict], examples: int, now: int, largest: int):
    rows = [*rows, {"kind": "epoch", "batch_size": 16, "eval_accuracy": None}] if examples == 1438 else rows
    seconds = dict.fromkeys([*PARTS, "wall"], 0.0)
    progress = Progress(1, examples, 90, 1438, 1)
    found = summary(History(rows), progress, Decision(now), seconds, torch.device("cpu"))
    assert found["largest_batch"] == largest


def test_no_run_there(tmp_path: Path):
    with pytest.raises(HessianFlowError, match="not a run directory"):
        History.load(tmp_path)


def test_a_used_directory_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text('{"kind":"epoch"}\n')
    with pytest.raises(HessianFlowError, match=r"already holds a run: .*`hessianflow resume"):
        RunRecord(tmp_path).start({})
    assert (tmp_path / "history.jsonl").read_text() == '{"kind":"epoch"}\n'
    assert not (tmp_path / "config.json").exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HessianFlowError, match="is not empty: name a new or an empty one"):
        RunRecord(tmp_path).start({})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unwritable_directory_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HessianFlowError, match="cannot write run directory"):
        RunRecord(tmp_path / "file" / "run").start({})


def test_reopen_cuts_rows_made_after_the_checkpoint(tmp_path: Path):
    record = RunRecord(tmp_path)
    record.start({"a": 1})
    record.write({"kind": "epoch", "epoch": 1})
    at_checkpoint = record.sync()
    record.write({"kind": "epoch", "epoch": 2})
    again = RunRecord(None)
    again.reopen(tmp_path, at_checkpoint)
    again.write({"kind": "epoch", "epoch": 2, "lr": 0.5})
    assert [row.get("lr") for row in History.load(tmp_path).epochs] == [None, 0.5]
    assert again.history().config["a"] == 1


def test_damaged_config_is_named(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text("")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HessianFlowError, match=r"config.json is not JSON"):
        History.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(HessianFlowError, match="must hold a JSON object, found a list"):
        History.load(tmp_path)


class Sink:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.closed = False

    def write(self, record):
        self.rows.append(dict(record))

    def close(self):
        self.closed = True


def test_sinks_get_every_row_and_the_end():
    sink = Sink()
    record = RunRecord(None, [sink])
    record.start({})
    record.write({"kind": "epoch"})
    record.finish({})
    record.close()
    assert sink.rows == [{"kind": "epoch"}]
    assert sink.closed


def test_a_run_that_another_process_writes_is_not_taken_over(tmp_path: Path):
    """The other is killed then: its claim goes with it, as after a crash."""
    pytest.importorskip("fcntl", reason="files are locked on POSIX systems only")
    record = RunRecord(tmp_path / "run")
    record.start({})
    record.write({"kind": "epoch", "epoch": 1})
    record.close()
    code = "import sys\nfrom pathlib import Path\nfrom hessianflow.training.record import claim\n"
    code += "held = claim(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(HessianFlowError, match=r"another process is writing to the run .*: wait for it, or stop"):
            RunRecord(None).reopen(tmp_path / "run", 0)
        assert len(History.load(tmp_path / "run").epochs) == 1, "nothing cut off"
        other.kill()
    RunRecord(None).reopen(tmp_path / "run", 0)
    assert not History.load(tmp_path / "run").epochs


def test_a_run_is_held_until_it_is_closed(tmp_path: Path):
    pytest.importorskip("fcntl", reason="files are locked on POSIX systems only")
    record = RunRecord(tmp_path / "run")
    record.start({})
    code = (
        "import sys\nfrom pathlib import Path\nfrom hessianflow.training.record import claim\nclaim(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert b"another process" in subprocess.run(command, capture_output=True, check=False).stderr
    record.close()
    again = RunRecord(None)
    again.reopen(tmp_path / "run", 0)
    assert b"another process" in subprocess.run(command, capture_output=True, check=False).stderr
    again.close()
    subprocess.run(command, check=True)
