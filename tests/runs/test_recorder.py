"""The run directory as it is written: what stands there, what is cut off, whose it is."""

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_rows import batch, curvature, epoch, event

from hessianflow.interfaces import Decision, HessianFlowError, Progress
from hessianflow.runs import History, Recorder
from hessianflow.runs.files import write_text
from hessianflow.runs.folder import Claim, new_folder
from hessianflow.runs.names import LOCK
from hessianflow.runs.rows import PARTS
from hessianflow.runs.summary import summary_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="files are locked on POSIX systems only")


class Other:
    """A process of its own that does what it is told, one thing a line, and answers with a line."""

    def __init__(self, act: Callable[[str], str]) -> None:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # of forks beside threads: this one only uses files
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            with theirs.makefile("rw") as lines:
                for line in lines:
                    lines.write(act(line.strip()) + "\n")
                    lines.flush()
            os._exit(0)
        theirs.close()
        self._lines = ours.makefile("rw")
        ours.close()

    def tell(self, line: str) -> None:
        self._lines.write(line + "\n")
        self._lines.flush()

    def hear(self) -> str:
        return self._lines.readline().strip()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._lines.close()


held: list[Claim] = []


def hold(folder: str) -> str:
    """What another process says that tries to hold a directory; it does so to its end."""
    try:
        held.append(Claim(Path(folder)))
    except HessianFlowError as error:
        return str(error)
    return "held"


def begin(folder: str) -> str:
    """What another process says that starts a run and ends it."""
    record = Recorder(folder)
    try:
        record.start({})
        record.write({"kind": "m", "who": os.getpid()})
    except HessianFlowError as error:
        return str(error)
    finally:
        record.close()
    return "began"


def test_rows_are_standard_json_and_come_back(tmp_path: Path):
    record = Recorder(tmp_path / "run")
    record.start({"settings": {"lr": 0.1}})
    record.write(curvature(eigenvalue=float("nan"), list=[1.0, float("inf"), 1e101]))
    record.write(batch(128, 256))
    record.write(batch(256, 256))
    record.finish({"status": "finished"})
    history = History.load(tmp_path / "run")
    assert history.curvature == [curvature(eigenvalue=None, list=[1.0, None, None])]
    assert history.growths == [batch(128, 256)]
    assert history.config["settings"] == {"lr": 0.1}
    assert history.config["environment"]["packages"]["torch"]
    assert history.summary == {"status": "finished"}
    assert record.history().records == history.records


def batch_row(examples: int, before: int, after: int) -> dict:
    return batch(before, after, examples=examples)


@pytest.mark.parametrize(
    ("rows", "examples", "now", "largest"),
    [
        ([], 0, 32, 32),
        ([batch_row(320, 32, 16)], 1438, 16, 32),  # shrank within its first epoch
        ([batch_row(320, 32, 64)], 500, 64, 64),  # interrupted before the epoch ended
        ([batch_row(1438, 32, 64)], 1438, 64, 32),  # decided on when training was over
        # taken back by a rollback
        ([batch_row(500, 32, 64), batch_row(500, 64, 32)], 1438, 32, 32),
    ],
)
def test_the_largest_batch_is_one_that_was_trained_with(
    rows: list[dict], examples: int, now: int, largest: int
):
    rows = [*rows, epoch(batch_size=16, eval_accuracy=None)] if examples == 1438 else rows
    seconds = dict.fromkeys([*PARTS, "wall"], 0.0)
    progress = Progress(1, examples, 90, 1438, 1)
    found = summary_of(History(rows), progress, Decision(now), seconds, torch.device("cpu"))
    assert found["largest_batch"] == largest


def test_a_used_directory_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text('{"kind":"epoch"}\n')
    with pytest.raises(
        HessianFlowError,
        match=r"already holds a run: name another, or delete that one, which has no",
    ):
        Recorder(tmp_path).start({})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    with pytest.raises(HessianFlowError, match=r"already holds a run: .*`hessianflow resume"):
        Recorder(tmp_path).start({})
    assert (tmp_path / "history.jsonl").read_text() == '{"kind":"epoch"}\n'
    assert not (tmp_path / "config.json").exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HessianFlowError, match="is not empty: name a new or an empty one"):
        Recorder(tmp_path).start({})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unwritable_directory_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HessianFlowError, match="cannot write run directory"):
        Recorder(tmp_path / "file" / "run").start({})


def test_reopen_cuts_rows_made_after_the_checkpoint(tmp_path: Path):
    record = Recorder(tmp_path)
    record.start({"a": 1})
    record.write(epoch(1))
    at_checkpoint = record.sync()
    record.write(epoch(2))
    again = Recorder(None)
    again.reopen(tmp_path, at_checkpoint)
    again.write(epoch(2, lr=0.5))
    assert [row["lr"] for row in History.load(tmp_path).epochs] == [0.1, 0.5]
    assert again.history().config["a"] == 1


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
    record = Recorder(None, [sink])
    record.start({})
    record.write(epoch())
    record.finish({})
    record.close()
    assert sink.rows == [epoch()]
    assert sink.closed


def test_a_history_that_was_edited_is_not_cut_within_a_row(tmp_path: Path):
    """Every line became longer by a byte: the length at the checkpoint now ends within a row."""
    record = Recorder(tmp_path)
    record.start({})
    for number in (1, 2, 3):
        record.write(epoch(number))
    length = record.sync()
    record.close()
    path = tmp_path / "history.jsonl"
    edited = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(edited)
    with pytest.raises(
        HessianFlowError,
        match=rf"was changed after the checkpoint was made: byte {length} no longer",
    ):
        Recorder(None).reopen(tmp_path, length)
    assert path.read_bytes() == edited


@posix
def test_a_run_that_another_process_writes_is_not_taken_over(tmp_path: Path):
    """The other is killed then: its claim goes with it, as after a crash, though its file stays."""
    record = Recorder(tmp_path)
    record.start({})
    record.write(epoch())
    record.close()
    other = Other(hold)
    other.tell(str(tmp_path))
    assert other.hear() == "held"
    with pytest.raises(
        HessianFlowError, match=r"another process is writing to the run .*: wait for it, or stop"
    ):
        Recorder(None).reopen(tmp_path, 0)
    with pytest.raises(HessianFlowError, match="already holds a run"):
        Recorder(tmp_path).start({})
    assert len(History.load(tmp_path).epochs) == 1, "nothing cut off"
    other.kill()
    assert (tmp_path / LOCK).exists()
    again = Recorder(None)
    again.reopen(tmp_path, 0)
    assert not History.load(tmp_path).epochs
    again.close()
    assert not (tmp_path / LOCK).exists()


@posix
def test_a_run_is_held_until_it_is_closed_and_by_no_child(tmp_path: Path):
    other = Other(hold)
    record = Recorder(tmp_path)
    record.start({})
    child = Other(hold)  # inherits what it can
    other.tell(str(tmp_path))
    assert "another process is writing to the run" in other.hear()
    record.close()
    other.tell(str(tmp_path))
    assert other.hear() == "held"
    child.kill()
    other.kill()


@posix
def test_two_that_begin_at_once_never_share_a_directory(tmp_path: Path):
    """Each of four starts, writes a row and ends; told to begin together, exactly one may, in each
    of 10 rounds."""
    racers = [Other(begin) for _ in range(4)]
    for number in range(10):
        for racer in racers:
            racer.tell(f"{tmp_path}/deep/run{number}")
        said = [racer.hear() for racer in racers]
        assert said.count("began") == 1, said
        assert all(
            "another process" in one or "already holds a run" in one
            for one in said
            if one != "began"
        ), said
        [row] = History.load(tmp_path / "deep" / f"run{number}").records
        assert row["who"] == racers[said.index("began")].pid
    for racer in racers:
        racer.kill()


def test_a_new_folder_is_made_at_the_moment_its_name_is_chosen(tmp_path: Path):
    base = tmp_path / "runs" / "absa"
    with new_folder(base) as first, new_folder(base) as second:
        assert (first, second) == (base, tmp_path / "runs" / "absa-2")
        (second / "file").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["absa-2"]
    with new_folder(tmp_path / "other" / "a"):
        pass
    assert not (tmp_path / "other").exists(), "nothing is left of a run that never began"
    (tmp_path / "file").touch()
    with (
        pytest.raises(HessianFlowError, match=r"cannot write run directory .*file/a"),
        new_folder(tmp_path / "file/a"),
    ):
        pass


def died(folder: Path, *names: str, **texts: str) -> Path:
    """A directory that holds these empty files, and these texts, by names without dots."""
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for name, text in texts.items():
        (folder / {"config": "config.json", "history": "history.jsonl"}[name]).write_text(text)
    return folder


OURS = json.dumps({"environment": {"packages": {"hessianflow": "0"}}})


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        ([LOCK], {}),
        ([LOCK, ".config.json.99999.tmp"], {}),
        (["config.json.tmp"], {}),  # of an earlier release
        ([LOCK, "config.json"], {}),  # a power cut before its content was on the disk
        (["history.jsonl", "settings.yaml"], {"config": OURS}),
        (["settings.yaml", "checkpoints/last.pt.tmp"], {"config": OURS, "history": ""}),
        (
            ["checkpoints/.last.pt.99999.tmp"],
            {"config": OURS, "history": json.dumps(event(number=0)) + "\n"},
        ),
    ],
)
def test_a_run_that_died_before_its_first_step_starts_over(
    names: list[str], texts: dict[str, str], tmp_path: Path
):
    folder = died(tmp_path / "run", *names, **texts)
    record = Recorder(folder)
    record.start({"settings": {"lr": 0.5}})
    record.close()
    assert History.load(folder).config["settings"] == {"lr": 0.5}
    assert History.load(folder).records == []
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"config.json", "settings.yaml", "history.jsonl"}


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        ([], {"config": '{"architectures": []}'}),  # of another program
        ([LOCK], {"config": '{"architectures": []}'}),
        ([LOCK], {"config": "{"}),
        (["settings.yaml"], {}),
        (["history.jsonl"], {}),
        (["checkpoints/model.bin"], {}),
        (["notes.txt.tmp"], {}),
        (["notes.txt", LOCK], {"config": OURS}),
        ([], {"config": OURS, "history": json.dumps(event(number=1)) + "\n"}),  # after an update
        ([], {"config": OURS, "history": "rubbish\n\n{}\n"}),
        (["checkpoints/last.pt"], {"config": OURS, "history": ""}),  # to be resumed
    ],
)
def test_what_is_not_a_run_that_died_at_once_is_refused_and_kept(
    names: list[str], texts: dict, tmp_path: Path
):
    folder = died(tmp_path / "run", *names, **texts)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(HessianFlowError, match=r"is not empty|already holds a run"):
        Recorder(folder).start({})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_leftovers_of_a_killed_process_go_when_a_run_goes_on(tmp_path: Path):
    record = Recorder(tmp_path)
    record.start({})
    record.close()
    (tmp_path / "checkpoints").mkdir()
    torn = [
        ".history.jsonl.1.tmp",
        "summary.json.tmp",
        "checkpoints/.last.pt.7.tmp",
        "checkpoints/previous.pt.tmp",
    ]
    for name in torn:
        (tmp_path / name).touch()
    (tmp_path / "mine.tmp").touch()
    again = Recorder(None)
    again.reopen(tmp_path, 0)
    again.close()
    assert {path.name for path in tmp_path.rglob("*.tmp")} == {"mine.tmp"}


@posix
def test_what_was_left_of_a_plot_goes_with_the_next_one(tmp_path: Path):
    ended = Other(hold)
    ended.kill()
    (tmp_path / f".a.html.{ended.pid}.tmp").touch()
    (tmp_path / f".a.html.{os.getppid()}.tmp").touch()  # its process runs: it may still be writing
    write_text(tmp_path / "a.html", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", f".a.html.{os.getppid()}.tmp"}
