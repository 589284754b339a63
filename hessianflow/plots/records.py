"""Read what runs left behind, for plotting: tolerant of interrupted runs and of rows that lack a field."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError

Row = Mapping[str, Any]
Array = NDArray[np.float64]


class HasRecords(Protocol):
    """A run in memory, such as `hf.History`; `config`, `summary` and `run_dir` are used where there are any."""

    @property
    def records(self) -> Sequence[Row]:
        """Rows as in history.jsonl."""
        ...


RunSource = str | Path | HasRecords
"""A run directory, or an object with `.records`."""


@dataclass(frozen=True)
class Run:
    """The records of one run.

    Attributes:
        name: what legends call it.
        records: the rows of history.jsonl, in order.
        config: config.json, empty if there is none.
        summary: summary.json, empty while the run has not ended.
        folder: the run directory, if it has one.
    """

    name: str
    records: Sequence[Row]
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def of_kind(self, kind: str) -> list[Row]:
        """All rows of one kind."""
        return [row for row in self.records if row.get("kind") == kind]

    @property
    def examples_per_epoch(self) -> float:
        """Size of the training set; nan before the first epoch has ended."""
        for row in self.of_kind("epoch"):
            epoch, examples = number(row, "epoch"), number(row, "examples")
            if epoch > 0 and examples > 0:
                return examples / epoch
        return math.nan


def read_runs(runs: RunSource | Iterable[RunSource]) -> list[Run]:
    """Read one run or several; names are the shortest ends of their paths that tell them apart.

    A run directory given twice, however spelled, is one run: it would count as two seeds that agree.

    Raises:
        HessianFlowError: no run given; a folder without history.jsonl; a damaged line before the last.
    """
    sources = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, str) else [runs]
    if not sources:
        raise HessianFlowError("runs must name at least one run directory, got none")
    read = [_read_folder(in_home(s)) if isinstance(s, (str, Path)) else _from_object(s) for s in sources]
    places = [f"run {i}" if run.folder is None else run.folder.resolve() for i, run in enumerate(read)]
    read = [run for i, run in enumerate(read) if places[i] not in places[:i]]
    return [replace(run, name=name) for name, run in zip(_names(read), read, strict=True)]


def number(row: Row, key: str) -> float:
    """A field as a float; nan where it is missing, null or not a number."""
    value = row.get(key)
    if isinstance(value, (int, float)):
        return float(value)
    return math.nan


def column(rows: Iterable[Row], key: str) -> Array:
    """One field of every row, shape [rows]."""
    return np.array([number(row, key) for row in rows], dtype=np.float64)


def batch_steps(run: Run) -> tuple[Array, Array]:
    """The batch size as a staircase: (examples at which it was set, batch size from there on).

    The last point repeats the last size at the end of the run.
    """
    changes = [r for r in run.of_kind("batch") if number(r, "to") > 0]
    epochs = run.of_kind("epoch")
    first = number(changes[0], "from") if changes else number(epochs[0], "batch_size") if epochs else math.nan
    end = max([number(r, "examples") for r in run.records], default=0.0, key=lambda v: -1.0 if math.isnan(v) else v)
    examples = [0.0, *(number(r, "examples") for r in changes), end]
    sizes = [first, *(number(r, "to") for r in changes)]
    return np.array(examples), np.array([*sizes, sizes[-1]])


def _read_folder(folder: Path) -> Run:
    path = folder / "history.jsonl"
    if not path.is_file():
        raise HessianFlowError(f"{folder} is not a run directory: it holds no history.jsonl")
    records = _read_lines(path)
    return Run("", records, _read_json(folder / "config.json"), _read_json(folder / "summary.json"), folder)


def _read_lines(path: Path) -> list[Row]:
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows: list[Row] = []
    for position, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if position == len(lines):  # cut short by a crash
                break
            raise HessianFlowError(
                f"{path} entry {position} of {len(lines)} is not JSON: the file is damaged"
            ) from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise HessianFlowError(f"{path} is not JSON: the file is damaged") from None
    return value if isinstance(value, dict) else {}


def _from_object(source: HasRecords) -> Run:
    folder = getattr(source, "run_dir", None) or getattr(source, "folder", None)
    config, summary = getattr(source, "config", {}), getattr(source, "summary", {})
    return Run("", list(source.records), config, summary, None if folder is None else Path(folder))


def _names(runs: Sequence[Run]) -> list[str]:
    parts = [r.folder.resolve().parts if r.folder else (f"run {i}",) for i, r in enumerate(runs, start=1)]
    names = [p[-1] for p in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            return names
        ends = [Path(*p[-depth:]).as_posix() for p in parts]  # joined by hand, the root would give "//"
        names = [n if names.count(n) == 1 else end for n, end in zip(names, ends, strict=True)]
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, start=1)]
