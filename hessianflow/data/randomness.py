"""Seed the generators from which a data set or a `collate_fn` draws, then restore them.

Workers would otherwise each draw from their copy of one generator, and no run could be resumed.
For each example, or batch, the global generators are seeded (Python, NumPy and torch on the CPU),
and so are those that the object holds, in its attributes or in what these hold (a list of
transforms, a wrapped data set). Generators that cannot be reached, such as those in the globals of
a module or in a closure, are left alone: `worker_init_fn` can seed them.
"""

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessianflow.data.streams import Stream, stream_seed

MOST_OBJECTS = 10_000
"""Number of objects after which the search for generators ends. This default is our choice."""
MOST_ENTRIES = 1_000
"""Entries of each list or dict that are searched. This default is our choice."""
_OPAQUE = (str, bytes, int, float, Tensor, np.ndarray, type, ModuleType)


class Randomness:
    """The generators that code of `owner` may draw from: the global ones, and those that it holds.

    The search runs at the first use in each process, and again after :meth:`look_again`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._held: list[Any] | None = None

    def look_again(self) -> None:
        """Forget which generators the owner held."""
        self._held = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore every generator at the end of the context."""
        if self._held is None:
            self._held = generators_of(self._owner)
        restorers: list[Callable[[], Any]] = [
            functools.partial(random.setstate, random.getstate()),
            functools.partial(np.random.set_state, np.random.get_state()),
            functools.partial(torch.set_rng_state, torch.get_rng_state()),
            *(_restorer(generator) for generator in self._held),
        ]
        try:
            yield
        finally:
            for restore in restorers:
                restore()

    def seed(self, seed: int, stream: Stream, *key: int) -> None:
        """Seed all generators, within :meth:`kept`; each of those held gets its own seed."""
        own = stream_seed(seed, stream, *key)
        random.seed(own)
        np.random.seed(own % 2**32)
        # torch.manual_seed would also queue a call for every GPU, in each worker, per example.
        torch.default_generator.manual_seed(own)
        if self._held:
            for number, generator in enumerate(self._held):
                _seed(generator, stream_seed(seed, "held", number, *key))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the generators, since another process has its own copies."""
        return {"_owner": self._owner, "_held": None}


def generators_of(owner: Any) -> list[Any]:
    """Return the random generators that `owner` holds, in an order that depends on it alone."""
    generators: list[Any] = []
    seen: set[int] = set()
    waiting = deque([owner])
    while waiting and len(seen) < MOST_OBJECTS:
        obj = waiting.popleft()
        if id(obj) in seen or isinstance(obj, _OPAQUE):
            continue
        seen.add(id(obj))
        if _is_generator(obj):
            generators.append(obj)
        else:
            waiting.extend(_contents(obj))
    return generators


def _is_generator(obj: Any) -> bool:
    if isinstance(obj, torch.Generator):
        return obj.device.type == "cpu"
    return isinstance(obj, (np.random.Generator, np.random.RandomState, random.Random))


def _contents(obj: Any) -> Iterator[Any]:
    if isinstance(obj, functools.partial):
        return iter((obj.func, *obj.args, *obj.keywords.values()))
    if isinstance(obj, Mapping):
        return islice(obj.values(), MOST_ENTRIES)
    if isinstance(obj, (list, tuple)):
        return islice(obj, MOST_ENTRIES)
    attributes = getattr(obj, "__dict__", {}).values()
    if callable(obj):  # a bound method holds its object
        return iter((getattr(obj, "__self__", None), *attributes))
    return iter(attributes)


def _restorer(generator: Any) -> Callable[[], Any]:
    """Return a function that restores the present state of the generator."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        generator.manual_seed(seed)
