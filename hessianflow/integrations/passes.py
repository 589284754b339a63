"""Batches of changing size in the form that hosts expect: passes with a length."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from hessianflow.interfaces import Batch, HessianFlowError, ResizableBatches, TellsPlace


@runtime_checkable
class CountsBatches(Protocol):
    """Batches that know how many of them end a pass that their size does not divide."""

    def batches_from(self, position: int) -> int:
        """Return the number of batches between a position and the end of a pass."""


class TellingBatches(ResizableBatches, TellsPlace, Protocol):
    """Resizable batches that tell their place, such as AdaptiveBatches and DeviceBatches."""


class Passes:
    """Resizable batches with the length of a pass, whose place can be saved and restored.

    Each iteration goes through the rest of one pass. No batch is taken ahead, so a new size takes
    effect with the very next batch, and a state taken between two batches loses none.

    Args:
        batches: `hf.data.AdaptiveBatches` or other batches that tell their place.

    Attributes:
        taken: Number of batches of the current pass that were handed out.

    Raises:
        HessianFlowError: The batches cannot change their size, or do not tell their place.
    """

    def __init__(self, batches: Any) -> None:
        if not isinstance(batches, ResizableBatches) or not isinstance(batches, TellsPlace):
            raise HessianFlowError(
                "batches must be able to change their size and tell their place, got"
                f" {type(batches).__name__}: use hf.data.AdaptiveBatches"
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
        """Return the number of completed passes; taking its last batch completes a pass."""
        return self.batches.epoch + (self.batches.cursor >= self.num_examples)

    @property
    def examples(self) -> int:
        """Return the number of examples handed out so far, over all passes and ranks."""
        return self.batches.epoch * self.num_examples + self.batches.cursor

    @property
    def left(self) -> int:
        """Return the number of batches that are left in the current pass, at the present size."""
        return self._batches_from(self.batches.cursor)

    def __len__(self) -> int:
        """Return the number of batches of this pass, or of the next one if all were taken."""
        if self.num_examples == sys.maxsize:
            raise TypeError("the number of batches of a stream without a length is not known")
        if self._is_at_end:
            return self._batches_from(0)
        return self.taken + self.left

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on."""
        if batch_size != self.batch_size:
            self.batches.set_batch_size(batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._is_at_end:  # a host that counts batches never reads to the end
            next(iter(self.batches), None)
            self.taken = 0
        for batch in self.batches:
            self.taken += 1
            yield batch
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the batches, and how many of them were taken."""
        return {"batches": self.batches.state_dict(), "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the place of a state, or with the next pass if its pass was complete."""
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
