"""The decisions that another controller would have made from a recorded run.

A replay changes only the decisions. The measurements stay those of the run as it was trained, under
its own batch sizes. So a replay shows when a rule would have changed the batch, but not the
accuracy that would have followed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from hessianflow.checks import check_count
from hessianflow.interfaces.control import (
    HESSIAN,
    BatchController,
    CurvatureReading,
    Decision,
    Progress,
)
from hessianflow.interfaces.errors import HessianFlowError

_MEASURING_KINDS = ("epoch", "curvature", "signals")
_SIGNALS = {"lr": "learning_rate", "train_loss": "epoch_loss"}
"""Signals that an epoch row holds, by their names in the row."""
_DETAILS = ("sharpness", "threshold")
"""Details of a reading by which controllers decide."""


@dataclass(frozen=True)
class ReplayStep:
    """One decision of the replayed controller.

    Attributes:
        epoch: Epochs completed.
        examples: Examples used.
        updates: Updates made so far with the batch sizes of the replayed controller.
        decision: Setting from here on.
        changed: Whether the decision differs from the setting before.
    """

    epoch: int
    examples: int
    updates: int
    decision: Decision
    changed: bool


@dataclass(frozen=True)
class Replay:
    """All decisions of a replay, and the updates that the whole run would have taken."""

    steps: tuple[ReplayStep, ...]
    updates: int

    @property
    def changes(self) -> tuple[ReplayStep, ...]:
        """Return the decisions that changed something."""
        return tuple(step for step in self.steps if step.changed)


def replay(
    rows: Iterable[Mapping[str, Any]],
    controller: BatchController,
    *,
    examples_per_epoch: int | None = None,
    total_epochs: int | None = None,
) -> Replay:
    """Feed the rows of a history.jsonl to a fresh controller.

    Rows of kind "epoch", "curvature" and "signals" are gathered by their number of examples, and
    each such moment is one opportunity to decide. The curvature row becomes the reading, and every
    number in the rows of the moment a signal of its name. `lr` and `train_loss` of the epoch row
    are also "learning_rate" and "epoch_loss", as the trainer names them. The recorded rate is the
    schedule's times the factor of the controller that trained; the replayed controller is shown the
    schedule's times its own factor. Updates are counted again from the batch sizes decided here,
    and every started batch counts as one. A controller that decides within epochs may so become due
    where its signals were not recorded: it decides at the next moment that holds them.

    Args:
        rows: Records of the run, in any order.
        controller: Controller to replay, which changes. Its `decision` beforehand is the setting
            that the run starts with.
        examples_per_epoch: Size of the training set; None stands for the recorded size.
        total_epochs: Planned epochs; None stands for the last epoch recorded.

    Raises:
        HessianFlowError: No epoch was recorded, or a signal that the controller needs was not.
    """
    rows = list(rows)
    moments = _moments(rows)
    ends = [row for row in rows if row.get("kind") == "epoch" and row["epoch"] > 0]
    if not ends:
        raise HessianFlowError("rows must hold at least one record of a completed epoch, got none")
    if examples_per_epoch is None:
        # Only at the end of an epoch do the examples used so far tell its size.
        examples_per_epoch = max(row["examples"] // row["epoch"] for row in ends)
    if total_epochs is None:
        total_epochs = max(moment["epoch"] for moment in moments)
    recorded = {name for moment in moments for name in _signals(moment, 1.0)}
    size = check_count("examples_per_epoch", examples_per_epoch)
    total = check_count("total_epochs", total_epochs)
    steps: list[ReplayStep] = []
    decision = controller.decision
    used = 0
    updates = 0
    for moment in moments:
        updates += math.ceil((moment["examples"] - used) / decision.batch_size)
        used = moment["examples"]
        progress = Progress(moment["epoch"], used, updates, size, total)
        # As in training, nothing is measured or decided at the end of the run.
        if progress.epoch >= total or not controller.is_due(progress):
            continue
        signals = _signals(moment, decision.lr_factor / (moment["lr_factor"] or 1.0))
        missing = controller.needs - {"eigenvalue"} - signals.keys()
        if missing and missing <= recorded:
            continue
        _check_recorded(controller, missing, progress.epoch)
        before = decision.setting
        decision = controller.update(progress, _reading(moment), signals)
        changed = decision.setting != before
        steps.append(ReplayStep(progress.epoch, used, updates, decision, changed))
    return Replay(tuple(steps), updates)


def _moments(rows: Iterable[Mapping[str, Any]]) -> Sequence[dict[str, Any]]:
    """Merge the measurements made after the same number of examples, in the order of training.

    `lr_factor` of each is the factor by which the recorded controller had multiplied the rate until
    then. The epochs of older records lack it. They have it only in their decisions, which follow
    the measurements made at the same place.
    """
    measured: dict[int, dict[str, Any]] = {}
    decided: dict[int, float] = {}
    for row in rows:
        if row.get("kind") in _MEASURING_KINDS:
            measured.setdefault(row["examples"], {}).update(row)
        elif row.get("kind") == "batch":
            decided[row["examples"]] = row["lr_factor"]
    factor = 1.0
    for examples in sorted(measured.keys() | decided.keys()):
        if examples in measured:
            measured[examples].setdefault("lr_factor", factor)
        factor = decided.get(examples, factor)
    return [measured[examples] for examples in sorted(measured)]


def _reading(moment: Mapping[str, Any]) -> CurvatureReading | None:
    if "eigenvalue" not in moment:
        return None
    return CurvatureReading(
        eigenvalue=_number(moment["eigenvalue"]),
        residual=_number(moment.get("residual")),
        matvecs=int(moment.get("matvecs", 0)),
        converged=bool(moment.get("converged", True)),
        reliable=bool(moment.get("reliable", True)),
        norm_mode=moment.get("norm_mode", "eval"),
        matrix=moment.get("matrix", HESSIAN),
        details={name: moment[name] for name in _DETAILS if moment.get(name) is not None},
    )


def _signals(moment: Mapping[str, Any], rate_ratio: float) -> dict[str, float]:
    """Return the numbers of a moment by name, with the learning rate times `rate_ratio`."""
    numbers = {
        name: float(value)
        for name, value in moment.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    renamed = {signal: numbers[name] for name, signal in _SIGNALS.items() if name in numbers}
    signals = renamed | numbers
    if "learning_rate" in signals:
        signals["learning_rate"] *= rate_ratio
    return signals


def _check_recorded(controller: BatchController, missing: Set[str], epoch: int) -> None:
    if missing:
        raise HessianFlowError(
            f"the record holds no {', '.join(sorted(missing))} at epoch {epoch}, by which"
            f" {type(controller).__name__} decides: replay a run whose controller measured them (of"
            " this name, or one that needs the same)"
        )


def _number(value: Any) -> float:
    # JSON has no NaN, so a value that was not finite may be recorded as null.
    return math.nan if value is None else float(value)
