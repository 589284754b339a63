"""What a run leaves behind: config.json, history.jsonl, summary.json, and their reader.

`history.jsonl` holds one JSON object a line, appended and flushed as it happens; `kind` says which (epoch, curvature,
batch, event). A run that dies leaves every completed line behind. Non-finite numbers are written as null, so that every
line is standard JSON.
"""

import json
import math
import os
import platform
import subprocess
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError, RecordSink

CONFIG, HISTORY, SUMMARY, SETTINGS = "config.json", "history.jsonl", "summary.json", "settings.yaml"
Record = dict[str, Any]

_COUNTS = ("epoch", "examples", "updates")
_NUMBERS = {
    "epoch": ("batch_size", "lr", "lr_factor", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "seconds"),
    "curvature": ("eigenvalue", "residual", "matvecs", "seconds"),
    "batch": ("from", "to", "lr_factor", "adversarial_share"),
}
"""Fields of the rows that are computed with, as far as a row has them."""
_NUMERIC = (int, float, type(None))  # null stands for what was not finite


@dataclass(frozen=True)
class History:
    """The records of one run, in the order they were made.

    Attributes:
        records: every row of history.jsonl.
        config: what config.json holds (empty for a run without a run directory).
        summary: what summary.json holds (empty while the run has not ended).
        run_dir: where it came from.
    """

    records: Sequence[Record]
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    run_dir: Path | None = None

    @classmethod
    def load(cls, run_dir: str | Path) -> "History":
        """Read a run directory; a last line cut short by a crash is left out.

        Raises:
            HessianFlowError: no history there, or a damaged line before the last.
        """
        folder = in_home(run_dir)
        path = folder / HISTORY
        if not path.is_file():
            raise HessianFlowError(f"{folder} is not a run directory: it holds no {HISTORY}")
        return cls(read_records(path), read_json(folder / CONFIG), read_json(folder / SUMMARY), folder)

    def of_kind(self, kind: str) -> list[Record]:
        """All rows of one kind: "epoch", "curvature", "batch" or "event"."""
        return [row for row in self.records if row["kind"] == kind]

    @property
    def epochs(self) -> list[Record]:
        """One row per completed epoch."""
        return self.of_kind("epoch")

    @property
    def curvature(self) -> list[Record]:
        """One row per curvature reading."""
        return self.of_kind("curvature")

    @property
    def growths(self) -> list[Record]:
        """The decisions that made the batch larger."""
        return [row for row in self.of_kind("batch") if row["to"] > row["from"]]


def read_records(path: Path) -> list[Record]:
    """All complete rows of a history file.

    Raises:
        HessianFlowError: a line other than the last is not a JSON object, or a number in it is none.
    """
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number >= len(lines) - 1:  # the last line, with or without its newline: cut short by a crash
                continue
            raise HessianFlowError(f"{path} line {number} is not JSON: the file is damaged") from None
        if not isinstance(row, dict) or "kind" not in row:
            raise HessianFlowError(f"{path} line {number} is not a record: the file is damaged")
        wrong = _not_a_number(row)
        if wrong is not None:
            raise HessianFlowError(
                f"{path} line {number}: {wrong} must be a number, got {json.dumps(row[wrong])}: the file is damaged"
            )
        rows.append(row)
    return rows


def _not_a_number(row: Record) -> str | None:
    """The first field of a row that should hold a number and does not."""
    kind = row["kind"]
    names = _NUMBERS.get(kind) if isinstance(kind, str) else None
    if names is None:
        return None
    for name in _COUNTS:
        if name in row and type(row[name]) not in (int, float):
            return name
    for name in names:
        if name in row and type(row[name]) not in _NUMERIC:
            return name
    return None


def history_length(run_dir: Path) -> int:
    """Bytes of a run directory's history.jsonl; 0 if there is none."""
    path = run_dir / HISTORY
    return path.stat().st_size if path.is_file() else 0


class RunRecord:
    """Writes the records of one run to its directory, if it has one, and to every sink.

    Args:
        run_dir: made if absent. None keeps records in memory only.
        sinks: further receivers of every record.
    """

    def __init__(self, run_dir: str | Path | None, sinks: Iterable[RecordSink] = ()) -> None:
        self.run_dir = None if run_dir is None else in_home(run_dir)
        self.records: list[Record] = []
        self._sinks = list(sinks)
        self._config: Mapping[str, Any] = {}
        self._summary: Mapping[str, Any] = {}
        self._release = _nothing

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the directory and write config.json.

        Raises:
            HessianFlowError: the directory already holds a run, or cannot be written.
        """
        self._config = {**config, "environment": environment()}
        if self.run_dir is None:
            return
        try:
            refuse_used(self.run_dir)
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _write_first(self.run_dir, self._config, config.get("settings"))
            self._hold(self.run_dir)
        except OSError as error:
            raise HessianFlowError(f"cannot write run directory {self.run_dir}: {error.strerror or error}") from None

    def reopen(self, run_dir: Path, history_bytes: int) -> None:
        """Take over a run directory at its checkpoint: rows written after it are cut off, to be made again.

        Raises:
            HessianFlowError: another process is writing to it.
        """
        self._config = read_json(run_dir / CONFIG)
        self._hold(run_dir)
        path = run_dir / HISTORY
        path.touch()  # a run killed before its first row may have none
        os.truncate(path, history_bytes)
        self.run_dir = run_dir
        self.records = read_records(path)

    def _hold(self, run_dir: Path) -> None:
        claimed = claim(run_dir)
        if claimed is not None:
            self._release = weakref.finalize(self, os.close, claimed)  # runs once, at the latest with the object's end

    def last_checkpoint(self) -> str:
        """Where the newest checkpoint is, in words."""
        if self.run_dir is None or not (self.run_dir / "checkpoints" / "last.pt").exists():
            return "no checkpoint was made yet"
        return f"the last good checkpoint is {self.run_dir / 'checkpoints' / 'last.pt'}"

    def sync(self) -> int:
        """Make sure that the history is on the disk; returns its length in bytes."""
        if self.run_dir is None:
            return 0
        with open(self.run_dir / HISTORY, "rb") as file:
            os.fsync(file.fileno())
        return (self.run_dir / HISTORY).stat().st_size

    def write(self, record: Record) -> None:
        """Append one row and hand it to every sink."""
        row = finite(record)
        self.records.append(row)
        if self.run_dir is not None:
            try:
                with open(self.run_dir / HISTORY, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
            except OSError as error:
                raise HessianFlowError(f"cannot write {self.run_dir / HISTORY}: {error.strerror or error}") from None
        for sink in self._sinks:
            sink.write(row)

    def has_event(self, event: str, message: str | None = None) -> bool:
        """Whether such an event was written before, with that message if one is given, here or in
        the run continued."""
        found = (row for row in self.records if row["kind"] == "event" and row["event"] == event)
        return any(message is None or row["message"] == message for row in found)

    def replace(self, records: Sequence[Record]) -> None:
        """Put these rows in the place of all that were written; sinks have seen those already."""
        self.records = list(records)
        if self.run_dir is not None:
            _write_whole(self.run_dir / HISTORY, "".join(json.dumps(row, allow_nan=False) + "\n" for row in records))

    def finish(self, summary: Record) -> None:
        """Write summary.json."""
        self._summary = finite(summary)
        if self.run_dir is not None:
            try:
                write_json(self.run_dir / SUMMARY, self._summary)
            except OSError as error:
                raise HessianFlowError(f"cannot write {self.run_dir / SUMMARY}: {error.strerror or error}") from None

    def close(self) -> None:
        """Close the sinks and let go of the directory, whether the run ended well or not."""
        self._release()
        for sink in self._sinks:
            sink.close()

    def history(self) -> History:
        """Everything written so far."""
        return History(list(self.records), self._config, self._summary, self.run_dir)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    _write_whole(path, json.dumps(finite(dict(value)), indent=2, allow_nan=False, default=str) + "\n")


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as the YAML that `hessianflow train --config` reads; the run directory is not among them."""
    import yaml

    kept = {key: value for key, value in settings.items() if key != "run_dir"}
    _write_whole(path, yaml.safe_dump(kept, sort_keys=False))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def claim(run_dir: Path) -> int | None:
    """Hold a run directory for this process, until the file is closed or the process ends, in whatever way.

    Two processes that resume one run would cut off and mix each other's rows. The lock is the process's own (POSIX):
    worker processes do not inherit it, so none of them can hold it beyond a crash. It is lost when the process opens
    and closes config.json once more, so whoever reads that file does so before.

    Returns:
        The descriptor of the locked file; None without such a file, or where files cannot be locked.

    Raises:
        HessianFlowError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        file = os.open(run_dir / CONFIG, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise HessianFlowError(f"another process is writing to the run {run_dir}: wait for it, or stop it") from None
    except OSError:  # some network file systems have no locks
        os.close(file)
        return None
    return file


def _nothing() -> None:
    pass


def refuse_used(folder: Path) -> None:
    """Refuse a folder that holds a run, or anything else, before a new run begins in it.

    Raises:
        HessianFlowError: saying what to do.
    """
    if not folder.is_dir() or _died_at_once(folder):
        return
    if (folder / HISTORY).exists():
        raise HessianFlowError(
            f"run directory {folder} already holds a run: name another, or continue that one with "
            f"`hessianflow resume {folder}` (from Python: trainer.resume)"
        )
    if any(folder.iterdir()):
        raise HessianFlowError(f"run directory {folder} is not empty: name a new or an empty one")


def _died_at_once(folder: Path) -> bool:
    """Whether a run began here and ended before it had anything worth keeping: no row, no checkpoint."""
    known = {CONFIG, SETTINGS, HISTORY, "checkpoints"}
    ours = all(path.name.removesuffix(".tmp") in known for path in folder.iterdir())
    checkpoints = any((folder / "checkpoints").glob("*.pt"))
    return ours and (folder / CONFIG).exists() and not checkpoints and history_length(folder) == 0


def _write_first(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    """The files a run begins with, or none of them: a full disk must not leave a directory that counts as used."""
    try:
        write_json(folder / CONFIG, config)
        if settings is not None:
            write_yaml(folder / SETTINGS, settings)
        (folder / HISTORY).touch()
    except OSError:
        for name in (CONFIG, SETTINGS, HISTORY):
            (folder / name).unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """The same structure with non-finite floats as None: standard JSON has no NaN."""
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def environment() -> Record:
    """Versions, processor and revision: what someone who repeats the run must know."""
    packages = {}
    for name in ("hessianflow", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "gpus": devices,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """The git commit of this package's own source tree; None for an installed copy."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def read_json(path: Path) -> Record:
    """A JSON object from a file, {} if there is none.

    Raises:
        HessianFlowError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise HessianFlowError(f"{path} is not JSON: the file is damaged") from None
    if not isinstance(value, dict):
        raise HessianFlowError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value
