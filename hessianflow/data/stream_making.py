"""Make batches from the examples that a stream gives, or from rows of the batches that it gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate

from hessianflow.batches import map_tensors, take_rows, to_device
from hessianflow.data import loading
from hessianflow.data.fingerprint import fingerprint
from hessianflow.data.randomness import Randomness
from hessianflow.data.regroup import Items, Rows, join
from hessianflow.interfaces import Batch
from hessianflow.structure import is_list


class BatchMaker:
    """Makes batches on a device from the examples that were taken from a queue.

    Args:
        collate_fn: Function that makes a batch from the list of its items; None for torch's
            default.
        transform: Function applied to every batch on the device.
        device: Device of the batches.
        pin_memory: Whether to make batches in page-locked memory.
        seed: Seed of everything that `collate_fn` draws.
        gives_batches: Whether the stream gives batches instead of examples.

    Attributes:
        device: Device of the batches.
        collate: The `collate_fn`, if it is not torch's default.
        is_stacked: Whether examples are stacked as they are read.
        takes_items: Whether `collate` makes the batches, so that single examples are kept.
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any] | None,
        transform: Callable[[Batch], Batch] | None,
        *,
        device: torch.device | str,
        pin_memory: bool,
        seed: int,
        gives_batches: bool,
    ) -> None:
        self.device = torch.device(device)
        self.collate = None if collate_fn is default_collate else collate_fn
        self.is_stacked = not gives_batches and self.collate is None
        self.takes_items = not self.is_stacked and not gives_batches
        self._randomness = Randomness(collate_fn)
        self._transform = transform
        self._pin_memory = pin_memory
        self._seed = seed

    def queue(self) -> Items | Rows:
        """Return an empty queue for what the stream gives."""
        if self.takes_items:
            return Items()
        if self.is_stacked:
            return Rows(lambda batch, rows, _: loading.rows_of(batch, rows))
        return Rows(take_rows)

    def made(self, taken: list[Any], rows: slice, *key: int) -> Any:
        """Return a batch of the rows of the examples taken; `collate_fn` is seeded by the key."""
        if rows.start == rows.stop:
            return self.without_rows(taken, *key)
        if self.takes_items:
            return self.collated(taken[rows], *key)
        whole = self._joined(taken)
        count = sum(size for size, _ in taken)
        if rows != slice(0, count):
            whole = take_rows(whole, rows, count)
        return self._on_device(whole)

    def without_rows(self, taken: list[Any], *key: int) -> Any:
        """Return an empty batch: one of the first example taken, without its only row."""
        if self.takes_items:
            return take_rows(self.collated(taken[:1], *key), slice(0, 0), 1)
        count, part = taken[0]
        return to_device(take_rows(part, slice(0, 0), count), self.device)

    def collated(self, items: list[Any], *key: int) -> Any:
        """Return a batch of the items on the device, before the transform."""
        if self.collate is None:
            return self._on_device(loading.stacked(items))
        with self._randomness.kept():
            self._randomness.seed(self._seed, "collate", *key)
            batch = self.collate(items)
        return self._on_device(batch)

    def finished(self, batch: Any) -> Batch:
        """Return a batch as it is handed out: transformed, and a list as a tuple."""
        if is_list(batch):
            batch = tuple(batch)
        if self._transform is None:
            return batch  # type: ignore[no-any-return]
        return self._transform(batch)

    def _joined(self, pieces: list[Any]) -> Any:
        if self.is_stacked:
            try:
                return loading.joined([part for _, part in pieces])
            except RuntimeError:  # the sizes differ, and the message of `join` names them
                return join(pieces)
        return join(pieces)

    def mark(self, taken: list[Any]) -> int | None:
        """Return the fingerprint of the last example taken; None if the stream gives batches."""
        if self.takes_items:
            return fingerprint(taken[-1])
        if self.is_stacked:
            count, part = taken[-1]
            return fingerprint(loading.rows_of(part, slice(count - 1, count)))
        return None

    def mark_of(self, example: Any) -> int:
        """Return the fingerprint of an example as it comes from the source."""
        if self.is_stacked:
            return fingerprint(loading.stacked([example]))
        return fingerprint(example)

    def _on_device(self, batch: Any) -> Any:
        if self._pin_memory:
            batch = map_tensors(lambda tensor: tensor.pin_memory(), batch)
        return to_device(batch, self.device, non_blocking=self._pin_memory)
