"""Batches of changing size in the form that hosts read: passes with a length."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from hessianflow.interfaces import Batch, HessianFlowError, ResizableBatches, TellsPlace


@runtime_checkable
class CountsBatches(Protocol):
    """Batches that know how they end a pass, where the size does not divide it."""

    def batches_from(self, position: int) -> int:
        """Return the number of batches between a position and the end of a pass."""


class TellingBatches(ResizableBatches, TellsPlace, Protocol):
    """Resizable batches that tell their place: AdaptiveBatches, DeviceBatches."""


class Passes:
    """Resizable batches with the length of a pass, and with a place that outlives a checkpoint.

    Each iteration goes through the rest of one pass. Nothing is read ahead, so that a change of the
    size reaches the very next batch, and a state taken between two batches loses none.

    Args:
        batches: `hf.data.AdaptiveBatches` or others that tell their place.

    Attributes:
        taken: Batches of the present pass that were handed out.

    Raises:
        HessianFlowError: The batches cannot change their size, or do not tell their place.
    """

    def __init__(self, batches: Any) -> None:
        if not isinstance(batches, ResizableBatches) or not isinstance(batches, TellsPlace):
            raise HessianFlowError(
                f"batches must be able to change their size and tell their place, as"
                f" hf.data.AdaptiveBatches do, got {type(batches).__name__}"
            )
        self.batches: TellingBatches = batches
        self.taken = 0

    @property
    def batch_size(self) -> int:
        """Return the number of examples per batch, over all ranks."""
        return self.batches.batch_size

    @property
    def num_examples(self) -> int:
        """Return the number of examples of a pass."""
        return self.batches.num_examples

    @property
    def epoch(self) -> int:
        """Return the number of completed passes; one whose last batch was taken is complete."""
        return self.batches.epoch + (self.batches.cursor >= self.num_examples)

    @property
    def examples(self) -> int:
        """Return the number of examples handed out so far, over all passes and ranks."""
        return self.batches.epoch * self.num_examples + self.batches.cursor

    @property
    def left(self) -> int:
        """Return the number of batches that are left of the present pass, at the present size."""
        return self._batches_from(self.batches.cursor)

    def __len__(self) -> int:
        """Return the batches of a pass: of this one, or of the next when all are taken."""
        if self.num_examples == sys.maxsize:
            raise TypeError("nobody knows how many batches a stream without a length has")
        if self._is_at_end:
            return self._batches_from(0)
        return self.taken + self.left

    def set_batch_size(self, batch_size: int) -> None:
        """Set the number of examples of a batch from the very next batch on."""
        if batch_size != self.batch_size:
            self.batches.set_batch_size(batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._is_at_end:  # a host that counts batches never asks for the one after the last
            next(iter(self.batches), None)
            self.taken = 0
        for batch in self.batches:
            self.taken += 1
            yield batch
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the batches, and how many were taken."""
        return {"batches": self.batches.state_dict(), "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of a state; a pass that was complete is left behind."""
        self.batches.load_state_dict(state["batches"])
        self.taken = state["taken"]
        if self._is_at_end:
            next(iter(self.batches), None)
            self.taken = 0

    @property
    def _is_at_end(self) -> bool:
        return self.batches.cursor >= self.num_examples

    def _batches_from(self, position: int) -> int:
        if isinstance(self.batches, CountsBatches):
            return self.batches.batches_from(position)
        return -(-(self.num_examples - position) // self.batch_size)
