"""What another controller would have done with the measurements of a recorded run.

A replay changes only the decisions: the measurements stay those of the run as it was trained, under
its own batch sizes. It answers when a rule would have fired, not what the accuracy would have been.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessianflow.control.checks import check_count
from hessianflow.interfaces.control import BatchController, CurvatureReading, Decision, Progress
from hessianflow.interfaces.errors import HessianFlowError

_MEASURING_KINDS = ("epoch", "curvature", "signals")
_SIGNALS = {"lr": "learning_rate", "train_loss": "epoch_loss"}
"""Names in an epoch row, and those of the signals they are."""


@dataclass(frozen=True)
class ReplayStep:
    """One decision of the replayed controller.

    Attributes:
        epoch: epochs completed.
        examples: examples used.
        updates: updates made so far with the batch sizes of the replayed controller.
        decision: what it decided.
        changed: whether that differs from the setting before.
    """

    epoch: int
    examples: int
    updates: int
    decision: Decision
    changed: bool


@dataclass(frozen=True)
class Replay:
    """All decisions, and the updates that the whole run would have taken."""

    steps: tuple[ReplayStep, ...]
    updates: int

    @property
    def changes(self) -> tuple[ReplayStep, ...]:
        """The decisions that changed something."""
        return tuple(step for step in self.steps if step.changed)


def replay(
    rows: Iterable[Mapping[str, Any]],
    controller: BatchController,
    *,
    examples_per_epoch: int | None = None,
    total_epochs: int | None = None,
) -> Replay:
    """Feed the rows of a history.jsonl to a fresh controller.

    Rows of kind "epoch", "curvature" and "signals" are gathered by their number of examples, each
    such moment being one opportunity to decide. The curvature row becomes the reading; every number
    in the rows of that moment is a signal under its own name; `lr` and `train_loss` of the epoch
    row also as "learning_rate" and "epoch_loss", the names the trainer gives them. The recorded
    rate is the schedule's times the factor of the controller that trained; the replayed one is
    shown the schedule's times its own. Updates are counted anew from the batch sizes decided here,
    every started batch as one.

    Args:
        rows: the records, in any order.
        controller: changed by the replay; its `decision` before is the setting that the run starts
            with.
        examples_per_epoch: size of the training set; None: read off the records.
        total_epochs: planned epochs; None: the last epoch recorded.

    Raises:
        HessianFlowError: no record of an epoch, or a signal that the controller needs was not
            recorded.
    """
    rows = list(rows)
    moments = _moments(rows)
    ends = [row for row in rows if row.get("kind") == "epoch" and row["epoch"] > 0]
    if not ends:
        raise HessianFlowError("rows must hold at least one record of a completed epoch, got none")
    # Only where an epoch ends do the examples used so far tell its size.
    recorded_size = max(row["examples"] // row["epoch"] for row in ends)
    size = check_count(
        "examples_per_epoch", recorded_size if examples_per_epoch is None else examples_per_epoch
    )
    last = max(moment["epoch"] for moment in moments)
    total = check_count("total_epochs", last if total_epochs is None else total_epochs)
    steps: list[ReplayStep] = []
    decision, used, updates = controller.decision, 0, 0
    for moment in moments:
        updates += math.ceil((moment["examples"] - used) / decision.batch_size)
        used = moment["examples"]
        progress = Progress(moment["epoch"], used, updates, size, total)
        # As in training: at the end nothing is left that a decision could change, and nothing was
        # measured for one.
        if progress.epoch >= total or not controller.is_due(progress):
            continue
        signals = _signals(moment, decision.lr_factor / (moment["lr_factor"] or 1.0))
        _check_recorded(controller, signals, progress.epoch)
        before, decision = decision, controller.update(progress, _reading(moment), signals)
        steps.append(
            ReplayStep(progress.epoch, used, updates, decision, decision.setting != before.setting)
        )
    return Replay(tuple(steps), updates)


def _moments(rows: Iterable[Mapping[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the measurements made after the same number of examples, merged; in the order of
    training.

    `lr_factor` of each is that by which the recorded controller had multiplied the rate until then.
    Records from before epochs told it have it in their decisions alone, which follow the
    measurements made at the same place.
    """
    found: dict[int, dict[str, Any]] = {}
    decided: dict[int, float] = {}
    for row in rows:
        if row.get("kind") in _MEASURING_KINDS:
            found.setdefault(row["examples"], {}).update(row)
        elif row.get("kind") == "batch":
            decided[row["examples"]] = row["lr_factor"]
    factor = 1.0
    for examples in sorted(found.keys() | decided.keys()):
        if examples in found:
            found[examples].setdefault("lr_factor", factor)
        factor = decided.get(examples, factor)
    return [found[examples] for examples in sorted(found)]


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
    )


def _signals(moment: Mapping[str, Any], rate_ratio: float) -> dict[str, float]:
    """Return the numbers of a moment by name; `rate_ratio`: the replayed rate over the recorded
    one."""
    numbers = {
        k: float(v)
        for k, v in moment.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    signals = {
        signal: numbers[name] for name, signal in _SIGNALS.items() if name in numbers
    } | numbers
    if "learning_rate" in signals:
        signals["learning_rate"] *= rate_ratio
    return signals


def _check_recorded(controller: BatchController, signals: Mapping[str, float], epoch: int) -> None:
    missing = sorted(controller.needs - {"eigenvalue"} - signals.keys())
    if missing:
        raise HessianFlowError(
            f"the record holds no {', '.join(missing)} at epoch {epoch}, by which"
            f" {type(controller).__name__} decides: replay a run whose controller measured them (of"
            " this name, or one that needs the same)"
        )


def _number(value: Any) -> float:
    # JSON has no NaN: what was not finite may be recorded as null.
    return math.nan if value is None else float(value)
