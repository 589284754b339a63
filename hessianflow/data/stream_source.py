"""The source of a stream, which is started once for each lap, and the chunks that workers send.

A lap is one iteration of the source, from its start to its end.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from hessianflow.batches import num_examples
from hessianflow.data import loading
from hessianflow.data.regroup import consumed
from hessianflow.interfaces import HessianFlowError
from hessianflow.structure import article

Chunk = tuple[int, Any]
"""A number of examples, and these examples as a list or as a batch."""


class Source:
    """An iterable, or a function that makes an iterator, which is started once for each lap.

    Raises:
        HessianFlowError: The data are neither.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.is_function = callable(data) and not isinstance(data, Iterable)
        if not self.is_function and not isinstance(data, Iterable):
            raise HessianFlowError(
                "dataset must be iterable data, or a function that makes an iterator, got"
                f" {article(data)}"
            )
        methods = (getattr(data, name, None) for name in ("state_dict", "load_state_dict"))
        self.has_state = not self.is_function and all(map(callable, methods))
        self.is_once = isinstance(data, Iterator) and not self.has_state
        self._was_begun = False

    @property
    def name(self) -> str:
        """Return the name of the source for messages and states."""
        return getattr(self.data, "__qualname__", type(self.data).__qualname__)

    @property
    def can_begin(self) -> bool:
        """Return whether the next lap can be started; a plain generator allows a single one."""
        return not (self.is_once and self._was_begun)

    def cannot_begin(self) -> HessianFlowError:
        """Return the error for starting a plain generator again."""
        return HessianFlowError(
            f"{article(self.data)} cannot be started again, neither for another pass nor to go"
            " back: pass the function that makes it instead of its result"
        )

    def begin(self, lap: int) -> Iterator[Any]:
        """Start a lap, after passing its number to every `set_epoch`."""
        if not self.can_begin:
            raise self.cannot_begin()
        self._was_begun = True
        if self.is_function:
            if _takes_a_number(self.data):
                return iter(self.data(lap))
            return iter(self.data())
        inner = [getattr(self.data, name, None) for name in ("dataset", "sampler")]
        for part in (self.data, *inner):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(lap)
        return iter(self.data)


def _takes_a_number(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C may have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in parameters)


class WorkerChunks(IterableDataset[Any]):
    """The data that workers iterate over and send.

    In each lap, a worker sends the number of examples that it dropped, and then its chunks.

    Args:
        source: The source to read.
        chunk_size: Examples in a chunk.
        pack: Function that makes a chunk from a list of examples; None if each item of the source
            is a batch, which is sent unchanged.

    Attributes:
        place: The lap to read next, and the number of examples that each worker drops at its
            start; int64 [2] in shared memory, which also reaches persistent workers.
    """

    def __init__(
        self, source: Source, chunk_size: int, pack: Callable[[list[Any]], Any] | None
    ) -> None:
        self._source = source
        self._chunk_size = chunk_size
        self._pack = pack
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Any]:
        lap, skipped = self.place.tolist()
        items = self._source.begin(lap)
        yield consumed(items, skipped)[0]
        if self._pack is None:
            yield from ((num_examples(batch), batch) for batch in items)
            return
        while chunk := list(islice(items, self._chunk_size)):
            yield self._pack(chunk)


def loader_options(
    num_workers: int,
    chunk_size: int,
    prefetch_examples: int,
    worker_init_fn: Callable[[int], None] | None,
    persistent_workers: bool,
) -> dict[str, Any]:
    """Return the arguments of the `DataLoader` that runs the workers."""
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "worker_init_fn": partial(loading.start_worker, worker_init_fn),
    }
    if num_workers:
        chunks = -(-prefetch_examples // (chunk_size * num_workers))
        options["prefetch_factor"] = max(2, chunks)
        options["persistent_workers"] = persistent_workers
    return options


def as_it_is(chunk: Any) -> Any:
    """Return a chunk unchanged; as a collate function, it sends the chunk as it is."""
    return chunk
