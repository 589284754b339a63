"""Smoothed values of the good readings of a probe."""

import statistics
from collections.abc import Mapping
from typing import Any, Literal, get_args

from hessianflow.checks import check_choice, check_count

Smoothing = Literal["none", "median", "ema"]


class SmoothedValue:
    """The median of the last `window` values, or an exponential moving average of all of them.

    In the average each value has weight 2 / (window + 1).
    """

    def __init__(self, kind: Smoothing, window: int) -> None:
        check_choice("smoothing", kind, get_args(Smoothing))
        check_count("window", window)
        self._kind = kind
        self._window = window
        self._recent: list[float] = []
        self._average: float | None = None

    def add(self, value: float) -> None:
        """Take one more value; the first starts the average."""
        self._recent = [*self._recent, value][-self._window :]
        if self._average is None:
            self._average = value
        else:
            self._average += 2 / (self._window + 1) * (value - self._average)

    def value(self) -> float | None:
        """Return the smoothed value; None without values or if none is wanted."""
        if self._kind == "none" or self._average is None:
            return None
        if self._kind == "ema":
            return self._average
        return statistics.median(self._recent)

    def state_dict(self) -> dict[str, Any]:
        """Return the state on which the next value depends."""
        return {"recent": list(self._recent), "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._recent = list(state["recent"])
        self._average = state["average"]
