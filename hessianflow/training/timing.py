"""Seconds by part of a run, on the clock of the device that does the work."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hessianflow.runs.rows import PARTS


class Stopwatch:
    """Adds up the time spent in named parts, and all wall time under "wall".

    On a CUDA device the parts are marked by events on the stream, read only when the totals are
    asked for, so that measuring never makes the host wait inside a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the body's time towards `name`."""
        if self._cuda:
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._pending.append((name, begin, end))
        else:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._totals[name] += time.perf_counter() - started

    def totals(self) -> dict[str, float]:
        """Return seconds per part so far, the parts before an interruption included."""
        for name, begin, end in self._pending:
            end.synchronize()  # called once an epoch: the host waits here for the last marked part
            self._totals[name] += begin.elapsed_time(end) / 1000
        self._pending.clear()
        now = time.perf_counter()
        self._totals["wall"] += now - self._started
        self._started = now
        return {name: self._totals[name] for name in (*PARTS, "wall")}

    def load(self, totals: Mapping[str, float]) -> None:
        """Continue from the totals of an earlier process."""
        self._totals = defaultdict(float, totals)
        self._started = time.perf_counter()
