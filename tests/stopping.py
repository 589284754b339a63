"""Stop a run where a test wants it to stop, from outside, as a program of a user's would.

The request needs the trainer, and the trainer takes what asks: so it is told afterwards.

    stop = StopAfter(examples=70)
    stop.trainer = AdaptiveBatchTrainer(..., transform=stop)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hessianflow import AdaptiveBatchTrainer
from hessianflow.interfaces import Progress


class StopAfter:
    """A transform that asks for one stop, when a batch reaches this number of examples."""

    trainer: AdaptiveBatchTrainer

    def __init__(self, examples: int) -> None:
        self.examples, self.asked = examples, False

    def __call__(
        self, inputs: Tensor, targets: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        if not self.asked and progress.examples + len(targets) >= self.examples:
            self.trainer.request_stop()
            self.asked = True
        return inputs, targets


class StopAfterEpoch:
    """A sink that asks for a stop when the row of this epoch is written."""

    trainer: AdaptiveBatchTrainer

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def write(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "epoch" and record["epoch"] == self.epoch:
            self.trainer.request_stop()

    def close(self) -> None: ...
