"""The rows of history.jsonl: the fields of each kind, how it is made and how it is checked.

Every row begins with its kind and its place in the run: epochs completed, and examples and updates
used so far. Rows may hold more fields than are listed here; a listed field always has this form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from hessianflow.interfaces import CurvatureReading, Decision, Progress
from hessianflow.runs.schema import Count, Fault, Figure, Share, Size, checker

PARTS = ("training", "data", "adversary", "curvature", "evaluation", "checkpoint")
"""The activities between which the seconds of a run are divided."""

Record = dict[str, Any]
"""A row of any kind."""


class Place(TypedDict):
    """The fields with which every row begins."""

    kind: str
    epoch: Count
    examples: Count
    updates: Count


class _EpochRequired(Place):
    batch_size: Size
    lr: Figure
    train_loss: Figure
    eval_accuracy: Share


class EpochRow(_EpochRequired, total=False):
    """A completed epoch: its final setting, its figures, and the seconds spent on each activity.

    `statistics` is "remeasured" if running statistics had not settled and were measured again
    before the evaluation.

    A run on a parameter server adds clock_seconds (the server's clock), predicted_seconds (the sum
    of the plans' target times), small_batch_size and resolution.
    """

    lr_factor: Figure
    adversarial_share: Share
    train_accuracy: Share
    eval_loss: Figure
    adversarial_gain: Figure
    statistics: str
    seconds: Figure
    images_per_second: Figure
    seconds_training: Figure
    seconds_data: Figure
    seconds_adversary: Figure
    seconds_curvature: Figure
    seconds_evaluation: Figure
    commits: Count
    clock_seconds: Figure
    predicted_seconds: Figure
    small_batch_size: Size | None
    resolution: Size


class _CurvatureRequired(Place):
    eigenvalue: Figure


class CurvatureRow(_CurvatureRequired, total=False):
    """A curvature reading; `note` says why the controller changed nothing, if it did not."""

    residual: Figure
    matvecs: Count
    converged: bool
    reliable: bool
    norm_mode: str
    matrix: str
    num_examples: Count
    seconds: Figure
    eigenvalues: list[Figure]
    note: str


_Change = TypedDict("_Change", {"from": Size, "to": Size})


class _BatchRequired(Place, _Change):
    lr_factor: Figure
    reason: str


class BatchRow(_BatchRequired, total=False):
    """A decision that changed a setting: the batch size `from` and `to`, and other settings."""

    adversarial_share: Share


class _CommitRequired(Place):
    commits: Count
    worker: Count
    started: Figure
    finished: Figure


class CommitRow(_CommitRequired, total=False):
    """A push of a worker to a parameter server; times are those of the server's clock."""

    staleness: Count
    rate_epoch: Count
    resolution: Size
    batch_size: Size
    steps: Count
    loss: Figure
    seconds: Figure


class _EventRequired(Place):
    event: str
    message: str


class EventRow(_EventRequired, total=False):
    """Any other event: a divergence, a fallback, a preemption, a change of an elastic world."""

    elapsed: Figure
    workers: Count
    pause: Figure


class ThroughputRow(Place):
    """The throughput of an elastic run and its workers, `elapsed` seconds after its start."""

    elapsed: Figure
    workers: Count
    batch_size: Size
    examples_per_second: Figure


class _Loose(TypedDict, total=False):
    epoch: Count
    examples: Count
    updates: Count


class _Measurement(_Loose):
    kind: str


_FORMS: Mapping[str, Any] = {
    "epoch": EpochRow,
    "curvature": CurvatureRow,
    "batch": BatchRow,
    "commit": CommitRow,
    "event": EventRow,
    "throughput": ThroughputRow,
    "signals": Place,
}
"""Kinds with a fixed form; all others are measurements, which name their own figures."""
_CHECKS: Mapping[str, Callable[[Any], Fault | None]] = {
    kind: checker(form) for kind, form in _FORMS.items()
}
_CHECK_MEASUREMENT = checker(_Measurement)


def row_fault(row: Any) -> Fault | None:
    """Return the first field of a row that is missing or wrong; None for a valid row."""
    kind = row.get("kind") if isinstance(row, dict) else None
    if isinstance(kind, str) and kind in _CHECKS:
        return _CHECKS[kind](row)
    return _CHECK_MEASUREMENT(row)


def place(kind: str, progress: Progress) -> Record:
    """Return the fields with which every row begins."""
    return {
        "kind": kind,
        "epoch": progress.epoch,
        "examples": progress.examples,
        "updates": progress.updates,
    }


def spent_on(seconds: Mapping[str, float], examples: int) -> Record:
    """Return the fields of an epoch's row that hold its throughput and its seconds.

    `seconds` are those of the epoch by activity, with the total as "wall".
    """
    working = seconds["training"] + seconds["data"]
    return {
        "seconds": seconds["wall"],
        "images_per_second": examples / max(working, 1e-9),
        # The attack runs inside the step, so its time is subtracted.
        "seconds_training": seconds["training"] - seconds["adversary"],
        **{f"seconds_{name}": seconds[name] for name in ("data", "adversary", "curvature")},
        "seconds_evaluation": seconds["evaluation"],
    }


def reading_row(progress: Progress, reading: CurvatureReading, note: str) -> Record:
    """Return the row of one reading; `note` says why the controller did not act on it, if so."""
    row: Record = {
        **place("curvature", progress),
        "eigenvalue": reading.eigenvalue,
        "residual": reading.residual,
        "matvecs": reading.matvecs,
        "converged": reading.converged,
        "reliable": reading.reliable,
        "norm_mode": reading.norm_mode,
        "matrix": reading.matrix,
        "num_examples": reading.num_examples,
        "seconds": reading.seconds,
        **reading.details,
    }
    if len(reading.eigenvalues) > 1:
        row["eigenvalues"] = list(reading.eigenvalues)
    if note:
        row["note"] = note
    return row


def decision_row(progress: Progress, before: Decision, after: Decision, share: float) -> Record:
    """Return the row of a decision that changed a setting; `share` of each batch is attacked under
    it."""
    return {
        **place("batch", progress),
        "from": before.batch_size,
        "to": after.batch_size,
        "lr_factor": after.lr_factor,
        "adversarial_share": share,
        "reason": after.reason,
    }


def measurement_row(progress: Progress, kind: str, figures: Mapping[str, float]) -> Record:
    """Return the row of a measurement after an epoch, or of the "signals" of observers."""
    return {**place(kind, progress), **figures}


def event_row(progress: Progress, event: str, message: str) -> Record:
    """Return the row of any other event."""
    return {**place("event", progress), "event": event, "message": message}


def has_no_step(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether none of these rows was made after an update."""
    return all(row["kind"] in ("event", "throughput") and row["updates"] == 0 for row in rows)
