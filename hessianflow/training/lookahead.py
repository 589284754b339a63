"""Batches on their way from the data to the optimizer step, as many steps ahead as the adversary wants to see them.

The order of training is that of the data, across the ends of epochs. A batch is trained under the decision it was drawn
under, rate and adversarial share included: with a look-ahead of tau steps a change of the batch size arrives tau steps
later, all of it together. Without look-ahead every batch is drawn just before its step.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hessianflow.batches import move, num_examples
from hessianflow.interfaces import Batch, Decision, HessianFlowError, Progress, ResizableBatches
from hessianflow.training.timing import Stopwatch


@dataclass
class Planned:
    """One batch, from its drawing to its step.

    Attributes:
        batch: (inputs, targets), on the device, transformed.
        examples: drawn from the data (a transform may have made another number of them).
        decision: in force when it was drawn.
        attacked: waits for the adversarial inputs; None: no attack was started.
    """

    batch: Batch
    examples: int
    decision: Decision
    attacked: Callable[[], Tensor] | None = None


class Lookahead:
    """The queue between data and step.

    Args:
        data: the stream of batches.
        depth: steps that a batch waits.
        load: puts a drawn batch on the device and transforms it; told the progress at the time of its use.
        device: where batches are put back when a run is resumed.
        watch: counts the time of drawing.
    """

    def __init__(
        self,
        data: ResizableBatches,
        depth: int,
        load: Callable[[Batch, Progress], Batch],
        device: torch.device,
        watch: Stopwatch,
    ) -> None:
        self._data, self._depth, self._load, self._device, self._watch = data, depth, load, device, watch
        self._queue: deque[Planned] = deque()

    def plan(self, now: Callable[[], tuple[Progress, Decision]]) -> Iterator[tuple[Planned, Planned | None]]:
        """(batch to train on, batch drawn for `depth` steps later), to the end of the run.

        The second is the first itself without look-ahead, and None when all batches of the run are drawn.

        Args:
            now: progress and decision at the moment.
        """
        drawn = self._drawn(now)
        if now()[0].updates == 0:
            for planned in islice(drawn, self._depth):
                self._queue.append(planned)
        while True:
            ahead = next(drawn, None)
            if ahead is not None:
                self._queue.append(ahead)
            if not self._queue:
                return
            yield self._queue.popleft(), ahead

    def _drawn(self, now: Callable[[], tuple[Progress, Decision]]) -> Iterator[Planned]:
        batches = iter(self._data)
        while True:
            progress, decision = now()
            queued = sum(entry.examples for entry in self._queue)
            used = progress.examples + queued
            if used >= progress.total_epochs * progress.examples_per_epoch:
                return
            with self._watch.part("data"):
                batch = next(batches, None)
            if batch is None:  # the end of an epoch: the data have entered the next one
                batches = iter(self._data)
                continue
            at_use = replace(
                progress,
                epoch=used // progress.examples_per_epoch,
                examples=used,
                updates=progress.updates + len(self._queue),
            )
            yield Planned(self._load(batch, at_use), num_examples(batch[1]), decision)

    def revise(self, change: Callable[[Decision], Decision]) -> None:
        """Train what is queued under other decisions: at another rate, that is, for its size is given."""
        for entry in self._queue:
            entry.decision = change(entry.decision)

    def state_dict(self) -> dict[str, Any]:
        """The queued batches with their adversarial inputs; waits for attacks under way."""
        return {
            "queue": [
                {
                    "batch": entry.batch,
                    "examples": entry.examples,
                    "decision": dict(vars(entry.decision)),
                    "adversarial": None if entry.attacked is None else entry.attacked(),
                }
                for entry in self._queue
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the data must go on with the batch after the last one queued."""
        for entry in self._queue:
            if entry.attacked is not None:
                entry.attacked()  # an attack under way must not end after the adversary has gone back
        self._queue = deque(self._restored(entry) for entry in state["queue"])

    def _restored(self, entry: Mapping[str, Any]) -> Planned:
        inputs, targets = move(entry["batch"], self._device)
        planned = Planned((inputs, targets), entry["examples"], Decision(**entry["decision"]))
        if entry["adversarial"] is not None:
            adversarial = move(entry["adversarial"], self._device)
            planned.attacked = lambda: adversarial
        return planned


def check_staleness(staleness: int, batch_size: int, examples: int, epochs: int) -> None:
    """Refuse a run in which no batch would be attacked ahead of its use.

    Raises:
        HessianFlowError: the run has no more than `staleness` steps.
    """
    steps = epochs * -(-examples // batch_size)
    if 0 < steps <= staleness:
        raise HessianFlowError(
            f"staleness must be smaller than the number of steps, got {staleness} for a run of {steps} steps"
        )
