"""Seconds by section of a run, on the clock of the device that does the work."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from hessianflow.runs.rows import PARTS


class _Section:
    """Adds the time of its body to one of the totals; a generator would be slower at every step."""

    __slots__ = ("_name", "_started", "_totals")

    def __init__(self, totals: defaultdict[str, float], name: str) -> None:
        self._totals = totals
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._totals[self._name] += time.perf_counter() - self._started


class Stopwatch:
    """Adds up the time spent in named sections, and all wall time under "wall".

    On a CUDA device events on the stream mark the sections. Only :meth:`totals` reads them, so that
    measuring never makes the host wait inside a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []
        self._started = time.perf_counter()

    def section(self, name: str) -> AbstractContextManager[None]:
        """Return a context whose body's time counts towards `name`."""
        if self._cuda:
            return self._on_device(name)
        return _Section(self._totals, name)

    @contextmanager
    def _on_device(self, name: str) -> Iterator[None]:
        event: Any = torch.cuda.Event
        begin = event(enable_timing=True)
        end = event(enable_timing=True)
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((name, begin, end))

    def totals(self) -> dict[str, float]:
        """Return seconds per section so far, those before an interruption included."""
        for name, begin, end in self._pending:
            # Once an epoch the host waits here for the end of the last section.
            end.synchronize()
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
