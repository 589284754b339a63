"""The number of examples in one forward pass: given, or found while training.

The optimization batch never depends on it: the gradient is that of the whole batch for every
microbatch size.

"auto" climbs by doubling: while the batch has room for twice the size, a few steps are timed at the
size in use and at twice that; the larger one stays if it is faster per example by more than the
noise. On a GPU the search usually ends at the largest size that fits; on a processor, where caches
matter, often at the first. An out-of-memory error halves the size for good, and the step is
repeated.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hessianflow.checks import check_count
from hessianflow.interfaces import HessianFlowError, World
from hessianflow.training.checks import must_pair

AUTO_START = 128
"""The first microbatch size of a search. This default is our choice."""
TIMED_STEPS = 3
"""Steps timed per candidate size; the median counts. This default is our choice."""
GAIN = 0.97
"""Most time per example at a larger size, as a share of that before. This default is our choice."""


class MicrobatchSize:
    """The microbatch size in use: as given, or under "auto" the fastest from `start` upwards."""

    def __init__(self, size: int | Literal["auto"], start: int, device: torch.device) -> None:
        self._searching = size == "auto"
        self._size = start
        if size != "auto":
            self._size = check_count("microbatch_size", size)
        self._limit: int | None = None
        self._candidate: int | None = None
        self._seconds: dict[int, list[float]] = {}
        self._proven = 0
        self._batch = 0
        self._device = device
        self._started = 0.0

    @property
    def size(self) -> int:
        """Examples per forward pass in the next step."""
        return self._candidate or self._size

    @property
    def is_proven(self) -> bool:
        """Whether a step with passes of this size has succeeded, so that memory should suffice."""
        return _largest_piece(self._batch, self.size) <= self._proven

    def begin(self, batch_size: int) -> int:
        """Return the size to run a step of `batch_size` examples with."""
        self._candidate = None
        self._batch = batch_size
        if self._searching and batch_size >= 2 * self._size:
            if len(self._seconds.get(self._size, ())) >= TIMED_STEPS:
                self._candidate = 2 * self._size
            self._started = self._now()
        return self.size

    def end(self, batch_size: int) -> None:
        """Note that a step of `batch_size` examples has succeeded."""
        size = self.size
        self._proven = max(self._proven, _largest_piece(batch_size, size))
        if not self._searching or batch_size < 2 * self._size:
            return
        times = self._seconds.setdefault(size, [])
        times.append((self._now() - self._started) / batch_size)
        if size != self._size and len(times) >= TIMED_STEPS:
            before = statistics.median(self._seconds[self._size])
            self._searching = statistics.median(times) <= GAIN * before
            if self._searching:
                self._size = size

    def out_of_memory(self, batch_size: int) -> None:
        """Halve the size for good, because a step of `batch_size` examples did not fit."""
        tried = min(self.size, batch_size)
        if tried <= 1:
            raise HessianFlowError(
                "out of memory with one example a forward pass: use a smaller model or input"
            )
        self._limit = tried // 2
        self._size = min(self._size, self._limit)
        self._proven = min(self._proven, self._limit)
        self._candidate = None
        self._searching = False

    def state_dict(self) -> dict[str, Any]:
        """Return the size, its limit, and whether the search goes on."""
        return {"size": self._size, "limit": self._limit, "searching": self._searching}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the search of :meth:`state_dict`; a size given by hand stays."""
        if self._searching:
            self._size = state["size"]
            self._limit = state["limit"]
            self._searching = state["searching"]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # Only during the few timed steps of a search.
        return time.perf_counter()


def _largest_piece(batch_size: int, size: int) -> int:
    """Return the number of examples in the largest microbatch that a batch is cut into."""
    pieces = max(1, -(-batch_size // size))
    return -(-batch_size // pieces)


def microbatches(
    model: nn.Module,
    world: World,
    size: int | Literal["auto"] | None,
    reference: int,
    examples: int,
) -> tuple[MicrobatchSize, bool]:
    """Return the microbatch size, and whether the forward passes of all ranks are paired.

    Paired passes are not cut into microbatches. A `size` of None stands for "auto" on a GPU, and
    elsewhere for the batch size of `reference`; `examples` is the number of training examples.
    """
    device = next(model.parameters()).device
    paired = must_pair(model, world, size)
    if paired:
        size = examples
    elif size is None:
        size = reference
        if device.type == "cuda":
            size = "auto"
    return MicrobatchSize(size, min(AUTO_START, reference), device), paired
