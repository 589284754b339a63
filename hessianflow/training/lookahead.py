"""The queue of batches between data and step, as long as the adversary's staleness.

The order of training is that of the data, across the ends of epochs. A batch is trained under the
decision that was in force when it was drawn, rate and attack factor included: with a look-ahead of
tau steps a new decision takes effect tau steps later as a whole. Without look-ahead every batch is
drawn just before its step.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessianflow.batches import num_examples, to_device
from hessianflow.interfaces import (
    Batch,
    Decision,
    HessianFlowError,
    Progress,
    ResizableBatches,
    TellsPlace,
)
from hessianflow.training.extent import Extent, Position
from hessianflow.training.timing import Stopwatch


@dataclass
class Planned:
    """One batch, from its drawing to its step, with the decision in force when it was drawn.

    Attributes:
        batch: (inputs, targets), on the device, transformed.
        examples: the number drawn from the data; a transform may change the number of rows.
        attacked: waits for the adversarial inputs; None: no attack was started.
        data_ended: whether the pass over the data ended after this batch, before their stated
            number of examples.
    """

    batch: Batch
    examples: int
    decision: Decision
    attacked: Callable[[], Tensor] | None = None
    data_ended: bool = False


Now = Callable[[], tuple[Position, Decision]]
"""Returns how far the run has come, and the decision in force."""


class Lookahead:
    """The queue between data and step, in which a batch waits `depth` steps.

    Batches are drawn until the end of the run, which `extent` determines. If an epoch is a pass
    over the data, it also ends with the last batch that the data give, should that come before
    their stated number of examples. A batch stays in the queue until it is :meth:`trained`, so that
    an error does not lose it. `load` puts a drawn batch on the device and transforms it, given the
    progress at its step. The stopwatch counts the time of drawing.
    """

    def __init__(
        self,
        data: ResizableBatches,
        extent: Extent,
        depth: int,
        load: Callable[[Batch, Progress], Batch],
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        self.depth = depth
        self._data = data
        self._extent = extent
        self._load = load
        self._device = device
        self._stopwatch = stopwatch
        self._place = Place(data)
        self._queue: deque[Planned] = deque()
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Return the number of queued batches."""
        return len(self._queue)

    def begin(self) -> None:
        """Begin with the first example of the data's epoch: batches may have been read before."""
        self.forget()
        self._place.rewind()

    def forget(self) -> None:
        """Drop the queue, and draw next from where the data stand now."""
        for entry in self._queue:
            if entry.attacked is not None:
                # An attack must not end, and change the adversary, after that has been put back.
                entry.attacked()
        self._queue.clear()
        self._batches = None
        self._place.forget()

    def plan(self, now: Now) -> Iterator[tuple[Planned, Planned | None] | None]:
        """Yield (batch to train on, batch drawn for `depth` steps later), to the end of the run.

        The second is the first itself without look-ahead, and None when all batches of the run are
        drawn. Yielding None means that the batch trained last ended a pass over the data.
        """
        while True:
            while len(self._queue) <= self.depth:
                position, decision = now()
                for entry in self._queue:
                    ended = entry.data_ended
                    position = self._extent.after(position, entry.examples, data_ended=ended)
                if self._extent.is_over(position):
                    break
                if not self._draw(position, decision):
                    yield None
            if not self._queue:
                return
            ahead: Planned | None = None
            if len(self._queue) > self.depth:
                ahead = self._queue[-1]
            yield self._queue[0], ahead

    def trained(self) -> None:
        """Remove the first batch of the queue, which has been trained."""
        self._queue.popleft()

    def _draw(self, position: Position, decision: Decision) -> bool:
        """Queue the next batch; return False if the last step turns out to have ended a pass."""
        before = self._place.find()
        batch = self._next_batch()
        if batch is None and position.read > 0:
            if not self._queue:
                return False
            self._queue[-1].data_ended = True
            return True
        if batch is None:  # The data have only now entered the pass to draw from.
            batch = self._next_batch()
        if batch is None:
            raise HessianFlowError(
                f"train_data gave no batch in epoch {position.epoch + 1}: pass data with at least"
                " one example, or a new iterator for each pass"
            )
        try:
            loaded = self._load(batch, self._extent.progress(position))
            self._queue.append(Planned(loaded, num_examples(batch), decision))
        except BaseException:
            self._place.note(before)  # The batch is to be drawn again.
            raise
        return True

    def _next_batch(self) -> Batch | None:
        """Return the next batch; None at the end of an epoch."""
        if self._place.put_back() or self._batches is None:
            self._batches = iter(self._data)
        try:
            with self._stopwatch.section("data"):
                batch = next(self._batches, None)
        except BaseException:
            self._batches = None  # A generator that has failed gives nothing more.
            self._place.stay()
            raise
        self._place.note()
        if batch is None:
            self._batches = None
        return batch

    def revise(self, change: Callable[[Decision], Decision]) -> None:
        """Change the decisions of queued batches: their rates, for their sizes are fixed."""
        for entry in self._queue:
            entry.decision = change(entry.decision)

    def state_dict(self) -> dict[str, Any]:
        """Return the queued batches with their adversarial inputs; wait for their attacks."""
        return {"queue": [_saved(entry) for entry in self._queue]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`; the data must continue after the last batch queued."""
        self.forget()
        self._queue = deque(self._restored(entry) for entry in state["queue"])

    def _restored(self, entry: Mapping[str, Any]) -> Planned:
        batch = to_device(entry["batch"], self._device)
        planned = Planned(batch, entry["examples"], Decision(**entry["decision"]))
        planned.data_ended = entry["ends_epoch"]
        if entry["adversarial"] is not None:
            adversarial = to_device(entry["adversarial"], self._device)
            planned.attacked = lambda: adversarial
        return planned


def _saved(entry: Planned) -> dict[str, Any]:
    adversarial: Tensor | None = None
    if entry.attacked is not None:
        adversarial = entry.attacked()
    return {
        "batch": entry.batch,
        "examples": entry.examples,
        "decision": dict(vars(entry.decision)),
        "ends_epoch": entry.data_ended,
        "adversarial": adversarial,
    }


class Place:
    """Remembers the place in a stream of batches, and returns there if other code has read on.

    The state of the stream must have its `epoch` and `cursor`, and the stream must tell them, as
    the two kinds of `hf.data` do. The place of any other is not known, and not put back.
    """

    def __init__(self, data: ResizableBatches) -> None:
        self._data = data
        kept = isinstance(data, TellsPlace) and {"epoch", "cursor"} <= data.state_dict().keys()
        self._is_known = kept
        self._noted: tuple[int, int] | None = None

    def find(self) -> tuple[int, int] | None:
        """Return the place remembered, or else that where the stream stands."""
        return self._noted or self._read()

    def note(self, place: tuple[int, int] | None = None) -> None:
        """Remember a place; None: that where the stream stands."""
        self._noted = place or self._read()

    def forget(self) -> None:
        """Forget the place, so that the stream is read next from where it stands."""
        self._noted = None

    def put_back(self) -> bool:
        """Go back to the place remembered; return whether the stream stood elsewhere."""
        if self._noted is None or self._read() == self._noted:
            return False
        self._go_to(self._noted)
        return True

    def stay(self) -> None:
        """Let the next iteration continue here: a stream without shuffling would start over."""
        place = self.find()
        if place is not None:
            self._go_to(place)

    def rewind(self) -> None:
        """Go to the first example of the current epoch, unless all of that was read."""
        place = self._read()
        if place is not None and 0 < place[1] < self._data.num_examples:
            self._go_to((place[0], 0))

    def _read(self) -> tuple[int, int] | None:
        if not self._is_known:
            return None
        return self._data.epoch, self._data.cursor  # type: ignore[attr-defined]

    def _go_to(self, place: tuple[int, int]) -> None:
        epoch, cursor = place
        self._data.load_state_dict({**self._data.state_dict(), "epoch": epoch, "cursor": cursor})


def check_staleness(staleness: int, batch_size: int, extent: Extent) -> None:
    """Refuse a run of at most `staleness` steps, in which no batch would be attacked in time."""
    steps = extent.steps(batch_size)
    if 0 < steps <= staleness:
        raise HessianFlowError(
            f"staleness must be smaller than the number of steps, got {staleness} for a run of"
            f" {steps} steps"
        )
