"""The one reader of a run's records, for training, plots, commands and experiments.

`history.jsonl` holds one JSON object per line, appended and flushed as it happens; `kind` tells
what it is (see :mod:`hessianflow.runs.rows`). A run that is killed leaves every completed line, and
perhaps half of one; that last line is skipped silently.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.documents import read_config, read_summary
from hessianflow.runs.files import NotJSONError, parsed, telling
from hessianflow.runs.names import CONFIG, HISTORY
from hessianflow.runs.rows import Record, row_fault

LONGEST_LINE = 2**20
"""Most bytes of a row. This default is our choice: runs write rows of a few hundred."""
SHOWN_EPOCHS = 10
"""Number of last epochs that a notebook shows. Our choice."""
SHOWN_FIELDS = (
    "epoch",
    "updates",
    "batch_size",
    "lr",
    "train_loss",
    "eval_loss",
    "eval_accuracy",
    "seconds",
)
"""Fields of an epoch that a notebook shows."""
Damaged = Literal["refuse", "skip"]
"""Treatment of a damaged line: refuse the file, or skip the line."""


@dataclass(frozen=True, repr=False)
class History:
    """The records of one run, in the order they were made.

    Attributes:
        records: Every row of history.jsonl.
        config: Content of config.json (empty for a run without a run directory).
        summary: Content of summary.json (empty while the run has not ended).
        run_dir: Run directory; None for a run without one.
    """

    records: Sequence[Record]
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    run_dir: Path | None = None

    @classmethod
    def load(cls, run_dir: str | Path, damaged: Damaged = "refuse") -> "History":
        """Read a run directory; a last line cut short by a crash is skipped.

        Args:
            run_dir: Run directory.
            damaged: "refuse" a history with a damaged line, or "skip" such lines, whose rows are
                then missing.

        Raises:
            HessianFlowError: There is no history, or a file is damaged; the message names the line
                or the field, and its value.
        """
        if damaged not in ("refuse", "skip"):
            raise HessianFlowError(f'damaged must be "refuse" or "skip", got {damaged!r}')
        folder = in_home(run_dir)
        path = folder / HISTORY
        if not path.is_file():
            raise HessianFlowError(f"{folder} is not a run directory: it holds no {HISTORY}")
        config: Mapping[str, Any] = read_config(folder)
        return cls(read_records(path, damaged), config, read_summary(folder), folder)

    def of_kind(self, kind: str) -> list[Record]:
        """Return all rows of one kind: "epoch", "curvature", "batch", "event", ..."""
        return [row for row in self.records if row.get("kind") == kind]

    @property
    def epochs(self) -> list[Record]:
        """Return one row per completed epoch."""
        return self.of_kind("epoch")

    @property
    def curvature(self) -> list[Record]:
        """Return one row per curvature reading."""
        return self.of_kind("curvature")

    @property
    def growths(self) -> list[Record]:
        """Return the rows of the decisions that made the batch larger."""
        return [row for row in self.of_kind("batch") if row["to"] > row["from"]]

    def to_pandas(self, kind: str = "epoch") -> Any:
        """Return the rows of one kind as a DataFrame, in order, with their fields as columns.

        Args:
            kind: "epoch", "curvature", "batch", "event", ... or "" for the rows of all kinds.

        Raises:
            HessianFlowError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise HessianFlowError(
                "History.to_pandas needs the package pandas: pip install 'hessianflow[notebook]';"
                f" History.of_kind({kind!r}) returns the rows as dicts"
            ) from None
        rows = list(self.records)
        if kind:
            rows = list(self.of_kind(kind))
        return DataFrame(rows)

    def __repr__(self) -> str:
        """Return one line that says what the run did, instead of all its rows."""
        return f"History({'; '.join(_facts(self))})"

    def _repr_html_(self) -> str:
        """Return a table of the last epochs, as a notebook shows it."""
        rows = self.epochs[-SHOWN_EPOCHS:]
        names = [name for name in SHOWN_FIELDS if any(row.get(name) is not None for row in rows)]
        head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in names) + "</tr>"
            for row in rows
        )
        title = escape("; ".join(_facts(self)))
        return f"<p>{title}</p><table><tr>{head}</tr>{body}</table>"

    def fact(self, name: str) -> Any:
        """Return a fact about the trainer, which config.json must hold ("examples_per_epoch")."""
        facts = self.config.get("trainer", {})
        if name not in facts:
            where = CONFIG if self.run_dir is None else self.run_dir / CONFIG
            raise HessianFlowError(
                f"{where} holds no trainer.{name}: the file is damaged, or of another program"
            )
        return facts[name]


def _facts(history: History) -> list[str]:
    """Return the main facts about a run, each in a few words."""
    facts = []
    if history.run_dir is not None:
        facts.append(str(history.run_dir))
    facts.append(f"{len(history.epochs)} epochs")
    if history.epochs:
        last = history.epochs[-1]
        facts.append(f"{last.get('updates')} updates")
        facts.append(f"batch {last.get('batch_size')}")
    facts.append(f"{len(history.curvature)} curvature readings")
    facts.append(f"{len(history.growths)} growths of the batch")
    if "status" in history.summary:
        facts.append(str(history.summary["status"]))
    return facts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value)


def read_records(path: Path, damaged: Damaged = "refuse") -> list[Record]:
    """Return all complete rows of a history file.

    Raises:
        HessianFlowError: The file cannot be read, a line before the last is not JSON, or any line
            is not a row.
    """
    rows: list[Record] = []
    torn: HessianFlowError | None = None
    for number, line in _lines(path):
        if torn is not None and damaged == "refuse":  # it was not the last line after all
            raise torn
        try:
            rows.append(_row(line))
        except NotJSONError as error:
            torn = _refusal(path, number, str(error))
        except HessianFlowError as error:
            if damaged == "refuse":
                raise _refusal(path, number, str(error)) from None
    return rows


def ends_a_row(history: Path, length: int) -> bool:
    """Return whether the first `length` bytes of a history are whole rows."""
    if length == 0:
        return True
    with open(history, "rb") as file:
        file.seek(length - 1)
        return file.read(1) == b"\n"


def _row(line: bytes) -> Record:
    if len(line) > LONGEST_LINE:
        raise HessianFlowError(f"it is longer than {LONGEST_LINE} bytes")
    row = parsed(line)
    if not isinstance(row, dict):
        raise HessianFlowError("it is not a record")
    fault = row_fault(row)
    if fault is not None:
        raise HessianFlowError(str(fault))
    return row


def _refusal(path: Path, number: int, what: str) -> HessianFlowError:
    remedy = 'delete the line, or load the others with hf.History.load(run_dir, damaged="skip")'
    return HessianFlowError(f"{path} line {number}: {what}: the file is damaged; {remedy}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text of every line that is not blank; cut overlong lines short."""
    with telling("read", path), open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if line.strip():
                yield number, line
            while len(line) > LONGEST_LINE and line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE + 1)
