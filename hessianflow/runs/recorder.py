"""The one writer of a run's records, to config.json, history.jsonl, summary.json and every sink."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError, RecordSink, TakesConfig
from hessianflow.runs.documents import read_config
from hessianflow.runs.environment import environment
from hessianflow.runs.files import finite, telling, write_json, write_text, write_yaml
from hessianflow.runs.folder import Claim, begin_in, clean, remove_empty
from hessianflow.runs.history import History, ends_a_row, read_records
from hessianflow.runs.names import CHECKPOINTS, CONFIG, HISTORY, LAST, SETTINGS, SUMMARY
from hessianflow.runs.rows import Record


class Recorder:
    """Writer of the records of one run, to its directory, if it has one, and to every sink.

    Args:
        run_dir: Run directory, made if absent; None keeps records in memory only.
        sinks: Other receivers of every record.
    """

    def __init__(self, run_dir: str | Path | None, sinks: Iterable[RecordSink] = ()) -> None:
        self.run_dir = None if run_dir is None else in_home(run_dir)
        self.records: list[Record] = []
        self._sinks = list(sinks)
        self._config: Mapping[str, Any] = {}
        self._summary: Mapping[str, Any] = {}
        self._claim: Claim | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the directory, hold it and write config.json.

        Raises:
            HessianFlowError: The directory already holds a run, or cannot be written.
        """
        self._config = {**config, "environment": environment()}
        self._tell_sinks()
        if self.run_dir is None:
            return
        existed = self.run_dir.exists()
        with telling("write run directory", self.run_dir):
            try:
                self._claim = begin_in(self.run_dir)
                self._write_first(self.run_dir, config.get("settings"))
            except OSError:
                self._release()
                if not existed:
                    remove_empty([self.run_dir])
                raise

    def hold(self, run_dir: Path) -> None:
        """Hold a run directory that is to be continued, before anything in it is read.

        Raises:
            HessianFlowError: It is not a run directory, another process is writing to it, or it
                cannot be written.
        """
        if not (run_dir / CONFIG).exists() and not (run_dir / CHECKPOINTS).exists():
            raise HessianFlowError(f"{run_dir} is not a run directory: it holds no {CONFIG}")
        with telling("write to run directory", run_dir):
            self._claim = Claim(run_dir)
        clean(run_dir)

    def reopen(self, run_dir: Path, history_bytes: int) -> None:
        """Take over a run directory at its checkpoint, when its history had `history_bytes`.

        The directory is held from here on. The rows after the checkpoint are cut off; the resumed
        run makes them again.

        Raises:
            HessianFlowError: Another process is writing to the directory, or the history does not
                fit the checkpoint.
        """
        if self._claim is None:
            self.hold(run_dir)
        self._config = dict(read_config(run_dir))
        self._tell_sinks()
        path = run_dir / HISTORY
        with telling("write", path):
            path.touch()  # a run killed before its first row may have none
            if not ends_a_row(path, history_bytes):
                raise HessianFlowError(
                    f"{path} was changed after the checkpoint was made: byte {history_bytes} no"
                    " longer ends a row"
                )
            os.truncate(path, history_bytes)
        self.run_dir = run_dir
        self.records = read_records(path)

    def last_checkpoint(self) -> str:
        """Return a phrase that says where the newest checkpoint is."""
        if self.run_dir is None or not (self.run_dir / CHECKPOINTS / LAST).exists():
            return "no checkpoint was made yet"
        return f"the last good checkpoint is {self.run_dir / CHECKPOINTS / 'last.pt'}"

    def sync(self) -> int:
        """Make sure that the history is on the disk, and return its length in bytes."""
        if self.run_dir is None:
            return 0
        with open(self.run_dir / HISTORY, "rb") as file:
            os.fsync(file.fileno())
        return (self.run_dir / HISTORY).stat().st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one row and hand it to every sink."""
        row = finite(record)
        self.records.append(row)
        if self.run_dir is not None:
            path = self.run_dir / HISTORY
            with telling("write", path), open(path, "a", encoding="utf-8") as file:
                file.write(_line(row))
        for sink in self._sinks:
            sink.write(row)

    def has_event(self, event: str, message: str | None = None) -> bool:
        """Return whether an event was recorded before, here or in the run that is continued.

        If `message` is given, only events with that message count.
        """
        same = (row for row in self.records if row["kind"] == "event" and row["event"] == event)
        return any(message is None or row["message"] == message for row in same)

    def replace(self, records: Sequence[Record]) -> None:
        """Replace all rows by `records`; sinks keep the rows that they received."""
        self.records = list(records)
        if self.run_dir is not None:
            with telling("write", self.run_dir / HISTORY):
                write_text(self.run_dir / HISTORY, "".join(map(_line, records)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, if the run has a directory."""
        self._summary = finite(summary)
        if self.run_dir is not None:
            with telling("write", self.run_dir / SUMMARY):
                write_json(self.run_dir / SUMMARY, self._summary)

    def close(self) -> None:
        """Close the sinks and release the directory, also after a failed run."""
        self._release()
        for sink in self._sinks:
            sink.close()

    def history(self) -> History:
        """Return everything written so far."""
        return History(list(self.records), self._config, self._summary, self.run_dir)

    def _tell_sinks(self) -> None:
        for sink in self._sinks:
            if isinstance(sink, TakesConfig):
                sink.configure(self._config)

    def _write_first(self, folder: Path, settings: Mapping[str, Any] | None) -> None:
        """Write the files that a run begins with, or none of them.

        A full disk must not leave a directory that looks used.
        """
        try:
            write_json(folder / CONFIG, self._config)
            if settings is not None:
                write_yaml(folder / SETTINGS, settings)
            # This drops the events of a run that ended before its first step.
            (folder / HISTORY).write_bytes(b"")
        except OSError:
            for name in (CONFIG, SETTINGS, HISTORY):
                (folder / name).unlink(missing_ok=True)
            raise

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
