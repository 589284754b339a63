"""The rows of results.jsonl: their form, their reader, and how one is added.

Every row carries its `format`. Rows of another format are left in the file, reported and not used,
so their cells run again; a last line cut short by a crash is cut off. Of several rows of one cell
the last counts.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import NotJSONError, parsed, write_text
from hessianflow.runs.schema import Count, Figure, Share, Size, fault_of

FORMAT = 1
RESULTS = "results.jsonl"
LONGEST_LINE = 2**24
"""Bytes of a row; measured spectra make the longest, of some ten thousand."""
Row = dict[str, Any]


class _EpochRequired(TypedDict):
    batch_size: Size


class _Epoch(_EpochRequired, total=False):
    lr: Figure
    updates: Count
    train_loss: Figure
    eval_loss: Figure
    eval_accuracy: Share
    eigenvalue: Figure


_Growth = TypedDict("_Growth", {"epoch": Count, "from": Size, "to": Size, "reason": str})


class _Density(TypedDict):
    epoch: Count
    nodes: list[list[float]]
    weights: list[list[float]]
    top: float


class _Slice(TypedDict):
    offsets: list[float]
    losses: list[Figure]


class _Robustness(TypedDict):
    accuracy: dict[str, list[tuple[float, float, float]]]


class _Measured(TypedDict, total=False):
    cpu_seconds: float
    robustness: _Robustness
    densities: list[_Density]
    slices: dict[str, _Slice]


class _CellOfRow(TypedDict):
    problem: str
    method: str
    seed: Count


class ResultRow(_CellOfRow, total=False):
    """A row of results.jsonl; what a study measured besides is under `measured`."""

    format: int
    accuracy: Share
    best_accuracy: Share
    updates: Count
    examples: Count
    largest_batch: Size
    seconds: Figure
    clock_seconds: Figure
    seconds_by_part: dict[str, Figure]
    peak_memory_mib: Figure
    growths: list[_Growth]
    epochs: list[_Epoch]
    settings: dict[str, Any]
    environment: dict[str, Any]
    measured: _Measured


def read_rows(path: Path) -> list[Row]:
    """Return the usable rows of a results file, the newest per (problem, method, seed); none where
    there is no file.

    Raises:
        HessianFlowError: a line before the last is not a JSON object; a row does not say which cell
            it is of, or a field of it has another form.
    """
    found: dict[tuple[str, str, int], Row] = {}
    foreign = 0
    for number, line in _whole_lines(path):
        row = _parsed_row(path, number, line)
        if row.get("format") != FORMAT:
            foreign += 1
            continue
        lacking = [name for name in ("problem", "method", "seed") if name not in row]
        if lacking:
            raise HessianFlowError(
                f"{path} line {number} has no {', '.join(lacking)}: mend it or delete the line"
            )
        fault = fault_of(row, ResultRow)
        if fault is not None:
            raise HessianFlowError(f"{path} line {number}: {fault}: mend it or delete the line")
        found[row["problem"], row["method"], row["seed"]] = row
    if foreign:
        sys.stderr.write(
            f"{path}: {foreign} rows of a format other than {FORMAT} not used; their cells run"
            " again\n"
        )
    return list(found.values())


def _parsed_row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = parsed(line)
    except NotJSONError:
        row = None
    except HessianFlowError as error:
        raise HessianFlowError(
            f"{path} line {number}: {error}: mend it or delete the line"
        ) from None
    if not isinstance(row, dict):
        raise HessianFlowError(
            f"{path} line {number} is not a JSON object: mend it or move the file away"
        )
    return row


def field(row: Mapping[str, Any], *names: str) -> Any:
    """Return a figure of a row, by the names that lead to it.

    Raises:
        HessianFlowError: the row has no such figure.
    """
    found: Any = row
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        where = f"{row['problem']} {row['method']}"
        raise HessianFlowError(
            f"a row of {where} has no {'.'.join(names)}: delete it, its cell runs again"
        )
    return found


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; what a crash left of an unfinished line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        whole = b"".join(line + b"\n" for _, line in _whole_lines(path))
        if path.read_bytes() != whole:
            write_text(path, whole.decode("utf-8"))
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, **row}, allow_nan=False) + "\n")


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    """Return the lines of a file with their numbers; the last one only if it is whole: valid JSON,
    or ended.

    Raises:
        HessianFlowError: the file cannot be read, or a line has no end.
    """
    if not path.is_file():
        return []
    found: list[bytes] = []
    try:
        with open(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise HessianFlowError(
                        f"{path} line {len(found) + 1} is longer than {LONGEST_LINE} bytes"
                    )
                found.append(line)
    except OSError as error:
        raise HessianFlowError(f"cannot read {path}: {error.strerror or error}") from None
    if found and not found[-1].endswith(b"\n") and _is_torn(found[-1]):
        found.pop()
    return [(number, line.rstrip(b"\n")) for number, line in enumerate(found, 1) if line.strip()]


def _is_torn(line: bytes) -> bool:
    try:
        parsed(line)
    except NotJSONError:
        return True
    except HessianFlowError:  # whole, and damaged
        return False
    return False
