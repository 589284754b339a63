"""Receivers of a run's records besides history.jsonl: TensorBoard files, and the logging module.

Any object with `write(record)` and `close()` can be such a receiver
(:class:`hessianflow.interfaces.RecordSink`).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessianflow.checks import in_home
from hessianflow.interfaces import HESSIAN, HessianFlowError

LOGGER = logging.getLogger("hessianflow")
_PLACE = ("kind", "epoch", "examples", "updates")
_SPOKEN = ("fallback", "rollback", "alarm")
"""Events that are logged as warnings, since the run continues and nothing else shows them."""


class TensorBoardSink:
    """Writer of TensorBoard files: scalars over training examples, and events and reasons as text.

    Tags are KIND/FIELD, such as "epoch/eval_accuracy", "curvature/eigenvalue", "batch/to". A
    resumed run makes the records after its checkpoint again, and TensorBoard shows only the new
    ones.

    Args:
        folder: Folder of the files, made at the first record.

    Raises:
        HessianFlowError: The package `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise HessianFlowError(
                "TensorBoard files need the package tensorboard: pip install"
                " 'hessianflow[tensorboard]'"
            ) from None
        self._make = SummaryWriter
        self._folder = in_home(folder)
        self._writer: SummaryWriter | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; the end of an epoch is flushed."""
        kind = record["kind"]
        step = record["examples"]
        if self._writer is None:
            # TensorBoard hides what an interrupted run wrote from purge_step on. If the first
            # record of a resumed run is an event at the checkpoint itself, records from before the
            # checkpoint may have the same step, and must stay.
            self._writer = self._make(str(self._folder), purge_step=step + (kind == "event"))
        for name, value in record.items():
            if name in _PLACE or value is None:
                continue
            if isinstance(value, (bool, int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, str):
                self._writer.add_text(f"{kind}/{name}", value, step)
        if kind == "epoch":
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class LogSink:
    """Writer of one line per epoch and decision to the logger "hessianflow" at level INFO.

    Readings are logged at DEBUG. A fallback to an older checkpoint, a rollback after a divergence
    and an alarm are logged at WARNING, other events at INFO.
    """

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record; kinds without a line of their own are skipped."""
        kind = record["kind"]
        if kind == "epoch":
            LOGGER.info(_epoch_line(record))
        elif kind == "batch":
            LOGGER.info(_decision_line(record))
        elif kind == "curvature":
            LOGGER.debug(_reading_line(record))
        elif kind == "event":
            level = logging.WARNING if record["event"] in _SPOKEN else logging.INFO
            LOGGER.log(level, f"{record['event']}: {record['message']}")

    def close(self) -> None:
        """Do nothing, since handlers belong to the code that set them up."""


def _epoch_line(row: Mapping[str, Any]) -> str:
    figures = {
        "train loss": row["train_loss"],
        "train accuracy": row["train_accuracy"],
        "test loss": row["eval_loss"],
        "test accuracy": row["eval_accuracy"],
    }
    known = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
    speed = f"{_figure(row['images_per_second'], '.0f')} images/s"
    return (
        f"epoch {row['epoch']}: batch {row['batch_size']}, lr {_figure(row['lr'])}, {known},"
        f" {speed}"
    )


def _decision_line(row: Mapping[str, Any]) -> str:
    batch = f"{row['from']} -> {row['to']}" if row["from"] != row["to"] else row["to"]
    settings = (
        f"lr factor {_figure(row['lr_factor'])}, adversarial share"
        f" {_figure(row['adversarial_share'])}"
    )
    return f"epoch {row['epoch']}: batch {batch}, {settings}: {row['reason']}"


def _reading_line(row: Mapping[str, Any]) -> str:
    if row["eigenvalue"] is None:
        return f"epoch {row['epoch']}: no finite eigenvalue"
    converged = "converged" if row["converged"] else "not converged"
    matrix = ""
    if row.get("matrix", HESSIAN) != HESSIAN:
        matrix = f" of the {row['matrix']}"
    return (
        f"epoch {row['epoch']}: eigenvalue {row['eigenvalue']:.6g}{matrix} ({converged},"
        f" {row['matvecs']} products)"
    )


def _figure(value: float | None, form: str = ".4g") -> str:
    """Return a figure of a row as text; a row holds null for a figure that was not finite."""
    if value is None:
        return "not finite"
    return format(value, form)
