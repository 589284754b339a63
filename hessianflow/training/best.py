"""The figure that decides which model of a run is the best, and whether the run ends early."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hessianflow.checks import check_choice, check_count
from hessianflow.interfaces import HessianFlowError
from hessianflow.training.course import Counters

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Best:
    """The recorded figure that decides which epoch is the best.

    Attributes:
        figure: name of a figure in the row of an epoch ("eval_loss", "train_loss") or in the row of
            a measurement made after the epoch, or "eigenvalue" for the eigenvalue of the reading.
            None: the accuracy on the evaluation data or, if there is none, their loss.
        mode: whether the highest or the lowest value is the best. It is ignored if `figure` is
            None: then an accuracy is the best at its highest, and a loss at its lowest value.
        patience: the run ends after this many epochs in a row without an improvement; None: it does
            not end early. A figure that is not finite is never an improvement.

    Raises:
        HessianFlowError: `mode` or `patience` has no valid value.
    """

    figure: str | None = None
    mode: Mode = "max"
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("Best.mode", self.mode, get_args(Mode))
        check_count("Best.patience", self.patience, none="no early end")

    def judge(self, counters: Counters, figures: Mapping[str, Any]) -> bool:
        """Count one more epoch with these figures, and return whether it is the best so far.

        Raises:
            HessianFlowError: the figure was not recorded.
        """
        is_better = self._is_better(counters, figures)
        counters.waited += 1
        if is_better:
            counters.waited = 0
        return is_better

    def is_exhausted(self, counters: Counters) -> bool:
        """Return whether the run has waited for a better epoch for as long as `patience` allows."""
        return self.patience is not None and counters.waited >= self.patience

    def _is_better(self, counters: Counters, figures: Mapping[str, Any]) -> bool:
        if self.figure is None:
            return counters.is_best(figures.get("eval_accuracy"), figures.get("eval_loss"))
        value = figures.get(self.figure)
        if not isinstance(value, (int, float)):
            known = sorted(name for name, held in figures.items() if isinstance(held, (int, float)))
            raise HessianFlowError(
                f"Best.figure {self.figure!r} is not recorded after an epoch of this run: choose"
                f" one of {', '.join(known)}"
            )
        if not math.isfinite(value):
            return False
        before = counters.best_figure
        if before is not None and not self._beats(value, before):
            return False
        counters.best_figure = float(value)
        return True

    def _beats(self, value: float, before: float) -> bool:
        if self.mode == "max":
            return value > before
        return value < before
