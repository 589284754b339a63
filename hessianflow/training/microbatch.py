"""How many examples one forward pass takes: given, or found while training; never more than memory
allows.

The optimization batch never depends on it: the gradient is that of the whole batch for every
microbatch size.

"auto" climbs by doubling: while the batch has room for twice the size, a few steps are timed at the
size in use and at twice that; the larger one stays if it is faster per example by more than the
noise. On a GPU that usually ends at the largest size that fits; on a processor, where caches
matter, often at the first. An out-of-memory error halves the size for good; the step is repeated,
not lost.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError, World
from hessianflow.training.checks import must_pair

AUTO_START = 128
"""Where the search for a microbatch size begins. Ours."""
TIMED_STEPS = 3
"""Steps timed per candidate size; the median counts. Ours."""
GAIN = 0.97
"""A larger size must take at most this share of the time per example. Ours."""


class MicrobatchSize:
    """The microbatch size in use.

    Args:
        size: examples a forward pass, or "auto" to find the fastest from `start` upwards.
        start: the first size under "auto".
        device: where the passes run.

    Raises:
        HessianFlowError: a size below 1.
    """

    def __init__(self, size: int | Literal["auto"], start: int, device: torch.device) -> None:
        self._searching = size == "auto"
        self._size = start if isinstance(size, str) else size
        if self._size < 1:
            raise HessianFlowError(f"microbatch_size must be at least 1, got {self._size}")
        self._limit: int | None = None
        self._candidate: int | None = None
        self._seconds: dict[int, list[float]] = {}
        self._proven = self._batch = 0
        self._device = device
        self._started = 0.0

    @property
    def size(self) -> int:
        """Examples a forward pass, for the next step."""
        return self._size if self._candidate is None else self._candidate

    @property
    def is_proven(self) -> bool:
        """Whether a step of this size has already gone through: no out-of-memory error is
        expected."""
        return _largest_piece(self._batch, self.size) <= self._proven

    def begin(self, batch_size: int) -> int:
        """Return the size to run a step of `batch_size` examples with."""
        self._candidate, self._batch = None, batch_size
        if (
            self._searching
            and batch_size >= 2 * self._size
            and (self._limit is None or 2 * self._size <= self._limit)
        ):
            if len(self._seconds.get(self._size, ())) >= TIMED_STEPS:
                self._candidate = 2 * self._size
            self._started = self._now()
        return self.size

    def end(self, batch_size: int) -> None:
        """The step went through; `batch_size` examples."""
        size = self.size
        self._proven = max(self._proven, _largest_piece(batch_size, size))
        if not self._searching or batch_size < 2 * self._size:
            return
        times = self._seconds.setdefault(size, [])
        times.append((self._now() - self._started) / batch_size)
        if size != self._size and len(times) >= TIMED_STEPS:
            faster = statistics.median(times) <= GAIN * statistics.median(self._seconds[self._size])
            self._size, self._searching = (size, True) if faster else (self._size, False)

    def out_of_memory(self, batch_size: int) -> None:
        """A step of `batch_size` examples did not fit: halve the size, for good.

        Raises:
            HessianFlowError: one example does not fit.
        """
        tried = min(self.size, batch_size)
        if tried <= 1:
            raise HessianFlowError(
                "out of memory with one example a forward pass: use a smaller model or input"
            )
        self._limit = tried // 2
        self._size = min(self._size, self._limit)
        self._proven = min(self._proven, self._limit)
        self._candidate, self._searching = None, False

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"size": self._size, "limit": self._limit, "searching": self._searching}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with what was found before, if this run searches too; a size given by hand
        stays."""
        if self._searching:
            self._size, self._limit, self._searching = (
                state["size"],
                state["limit"],
                state["searching"],
            )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # only during the few timed steps of a search
        return time.perf_counter()


def _largest_piece(batch_size: int, size: int) -> int:
    """Return the number of examples in the largest of the equal pieces that a batch is cut into."""
    pieces = max(1, -(-batch_size // size))
    return -(-batch_size // pieces)


def microbatches(
    model: nn.Module,
    world: World,
    size: int | Literal["auto"] | None,
    reference: int,
    examples: int,
) -> tuple[MicrobatchSize, bool]:
    """Return the size to run with, and whether the passes of all ranks are paired, so that each
    part is one pass.

    Args:
        model: on its device.
        world: the ranks.
        size: as asked for; None: "auto" on a GPU, elsewhere the reference batch size.
        reference: the reference batch size.
        examples: of the data.
    """
    device, paired = next(model.parameters()).device, must_pair(model, world, size)
    if paired:
        size = examples
    if size is None:
        size = "auto" if device.type == "cuda" else reference
    return MicrobatchSize(size, min(AUTO_START, reference), device), paired
