"""Runs as figures see them: named, several at a time, from disk or from memory, and in columns of
numbers.

Directories are read by :class:`hessianflow.runs.History`; rows of objects in memory may lack any
field.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import History
from hessianflow.runs.text import plain

Row = Mapping[str, Any]
Array = NDArray[np.float64]


class HasRecords(Protocol):
    """A run in memory, such as `hf.History`; `config`, `summary` and `run_dir` are used where there
    are any."""

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
        """Return all rows of one kind."""
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

    A run directory given twice, however spelled, is one run: it would count as two seeds that
    agree.

    Raises:
        HessianFlowError: no run given; a folder without history.jsonl; a damaged file.
    """
    sources = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, str) else [runs]
    if not sources:
        raise HessianFlowError("runs must name at least one run directory, got none")
    read = [
        _read_folder(in_home(s)) if isinstance(s, (str, Path)) else _from_object(s) for s in sources
    ]
    places = [
        f"run {i}" if run.folder is None else run.folder.resolve() for i, run in enumerate(read)
    ]
    read = [run for i, run in enumerate(read) if places[i] not in places[:i]]
    return [replace(run, name=name) for name, run in zip(_names(read), read, strict=True)]


def number(row: Row, key: str) -> float:
    """Return a field as a float; nan where it is missing, null or not a number."""
    value = row.get(key)
    if isinstance(value, (int, float)):
        return float(value)
    return math.nan


def column(rows: Iterable[Row], key: str) -> Array:
    """One field of every row, shape [rows]."""
    return np.array([number(row, key) for row in rows], dtype=np.float64)


def batch_steps(run: Run) -> tuple[Array, Array]:
    """Return the batch size as a staircase: (examples at which it was set, batch size from there
    on).

    The last point repeats the last size at the end of the run.
    """
    changes = [r for r in run.of_kind("batch") if number(r, "to") > 0]
    epochs = run.of_kind("epoch")
    first = (
        number(changes[0], "from")
        if changes
        else number(epochs[0], "batch_size")
        if epochs
        else math.nan
    )
    end = max(
        [number(r, "examples") for r in run.records],
        default=0.0,
        key=lambda v: -1.0 if math.isnan(v) else v,
    )
    examples = [0.0, *(number(r, "examples") for r in changes), end]
    sizes = [first, *(number(r, "to") for r in changes)]
    return np.array(examples), np.array([*sizes, sizes[-1]])


def _read_folder(folder: Path) -> Run:
    found = History.load(folder)
    return Run("", found.records, found.config, found.summary, folder)


def _from_object(source: HasRecords) -> Run:
    folder = getattr(source, "run_dir", None) or getattr(source, "folder", None)
    config, summary = getattr(source, "config", {}), getattr(source, "summary", {})
    return Run("", list(source.records), config, summary, None if folder is None else Path(folder))


def _names(runs: Sequence[Run]) -> list[str]:
    parts = [
        r.folder.resolve().parts if r.folder else (f"run {i}",) for i, r in enumerate(runs, start=1)
    ]
    parts = [tuple(plain(part) for part in one) for one in parts]
    names = [p[-1] for p in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            return names
        ends = [
            Path(*p[-depth:]).as_posix() for p in parts
        ]  # joined by hand, the root would give "//"
        names = [n if names.count(n) == 1 else end for n, end in zip(names, ends, strict=True)]
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, start=1)]
