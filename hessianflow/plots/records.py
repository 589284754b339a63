"""Runs in the form that figures use: with names, and in columns of numbers.

:class:`hessianflow.runs.History` reads directories; rows of objects in memory may lack any field.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import History
from hessianflow.runs.text import plain

Row = Mapping[str, Any]
Array = NDArray[np.float64]


class HasRecords(Protocol):
    """A run in memory, such as `hf.History`, that may have `config`, `summary` and `run_dir`."""

    @property
    def records(self) -> Sequence[Row]:
        """Return rows like those of history.jsonl."""


RunSource = str | Path | HasRecords
"""A run directory, or an object with `.records`."""


@dataclass(frozen=True)
class Run(History):
    """The records of one run, with its name in legends."""

    name: str = ""

    @property
    def examples_per_epoch(self) -> float:
        """Return the size of the training set; nan before the first epoch has ended."""
        for row in self.of_kind("epoch"):
            epoch = number(row, "epoch")
            examples = number(row, "examples")
            if epoch > 0 and examples > 0:
                return examples / epoch
        return math.nan


def read_runs(runs: RunSource | Iterable[RunSource]) -> list[Run]:
    """Read one run or several, and name them by the shortest ends of their paths that differ.

    A run directory that is passed twice, however spelled, is one run: otherwise it would count as
    two seeds that agree.
    """
    sources: list[Any] = [runs]
    if isinstance(runs, Iterable) and not isinstance(runs, str):
        sources = list(runs)
    if not sources:
        raise HessianFlowError("runs must name at least one run directory, got none")
    read: list[Run] = []
    folders = set()
    for run in map(_read, sources):
        if run.run_dir is not None:
            if run.run_dir.resolve() in folders:
                continue
            folders.add(run.run_dir.resolve())
        read.append(run)
    return [replace(run, name=name) for name, run in zip(_names(read), read, strict=True)]


def number(row: Row, key: str) -> float:
    """Return a field as a float; nan if it is missing, null or not a number."""
    value = row.get(key)
    if isinstance(value, (int, float)):
        return float(value)
    return math.nan


def column(rows: Iterable[Row], key: str) -> Array:
    """Return one field of every row, shape [rows]."""
    return np.array([number(row, key) for row in rows], dtype=np.float64)


def batch_steps(run: Run) -> tuple[Array, Array]:
    """Return the batch size as a staircase: the examples at which it was set, and each size.

    The last point repeats the last size at the end of the run.
    """
    changes = [r for r in run.of_kind("batch") if number(r, "to") > 0]
    first = math.nan
    if changes:
        first = number(changes[0], "from")
    elif epochs := run.of_kind("epoch"):
        first = number(epochs[0], "batch_size")
    counts = [number(r, "examples") for r in run.records]
    end = max(counts, default=0.0, key=lambda count: (not math.isnan(count), count))
    examples = [0.0, *(number(r, "examples") for r in changes), end]
    sizes = [first, *(number(r, "to") for r in changes)]
    return np.array(examples), np.array([*sizes, sizes[-1]])


def _read(source: str | Path | HasRecords) -> Run:
    if isinstance(source, (str, Path)):
        source = History.load(source)
    folder = getattr(source, "run_dir", None)
    if folder is not None:
        folder = Path(folder)
    records: Any = list(source.records)
    return Run(records, getattr(source, "config", {}), getattr(source, "summary", {}), folder)


def _names(runs: Sequence[Run]) -> list[str]:
    paths: list[tuple[str, ...]] = []
    for index, run in enumerate(runs, start=1):
        if run.run_dir is None:
            paths.append((f"run {index}",))
        else:
            paths.append(tuple(map(plain, run.run_dir.resolve().parts)))
    names = [path[-1] for path in paths]
    for depth in range(2, max(map(len, paths)) + 1):
        if len(set(names)) == len(names):
            return names
        # Path joins them, because the root is a "/" already.
        names = distinct(names, [Path(*path[-depth:]).as_posix() for path in paths])
    return distinct(names, [f"{name} ({index})" for index, name in enumerate(names, start=1)])


def distinct(labels: Sequence[str], longer: Sequence[str]) -> list[str]:
    """Return the labels, with the longer one in place of each that occurs more than once."""
    pairs = zip(labels, longer, strict=True)
    return [label if labels.count(label) == 1 else instead for label, instead in pairs]
