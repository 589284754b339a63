"""The random numbers that a data set or a `collate_fn` draws: seeded each time, then put back.

For each example, or batch, the global generators are seeded (Python, NumPy and torch on the CPU),
and so are those that the object holds: in its attributes, and in what these hold (a list of
transforms, a wrapped data set). Workers would otherwise each draw from their copy of one
generator, and no run could be resumed. Generators out of reach, such as those in the globals of a
module or in a closure, are the owner's affair: `worker_init_fn` can seed them.
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
"""Where the search for generators ends. Ours."""

MOST_ENTRIES = 1_000
"""Of each list or dict that is searched. Ours."""

_OPAQUE = (str, bytes, int, float, Tensor, np.ndarray, type, ModuleType)


class Randomness:
    """The generators that code of `owner` may draw from: the global ones, and those that it holds.

    They are looked for at the first use in each process, and again after :meth:`look_again`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._held: list[Any] | None = None

    def look_again(self) -> None:
        """Forget which generators the owner held."""
        self._held = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put every generator back afterwards."""
        if self._held is None:
            self._held = generators_of(self._owner)
        python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
        states = [_state_of(generator) for generator in self._held]
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)
            torch.set_rng_state(torch_)
            for put_back in states:
                put_back()

    def seed(self, seed: int, stream: Stream, *key: int) -> None:
        """Seed all of them, within :meth:`kept`; those held each with a seed of their own."""
        own = stream_seed(seed, stream, *key)
        random.seed(own)
        np.random.seed(own % 2**32)
        # torch.manual_seed would also queue a call for every GPU, in each worker and for each
        # example.
        torch.default_generator.manual_seed(own)
        if self._held:
            for number, generator in enumerate(self._held):
                _seed(generator, stream_seed(seed, "held", number, *key))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what was found: another process has copies of its own."""
        return {"_owner": self._owner, "_held": None}


def generators_of(owner: Any) -> list[Any]:
    """Return the random generators among what `owner` holds, in an order that depends on nothing
    else."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = deque([owner])
    while waiting and len(seen) < MOST_OBJECTS:
        part = waiting.popleft()
        if id(part) in seen or isinstance(part, _OPAQUE):
            continue
        seen.add(id(part))
        if isinstance(
            part, (np.random.Generator, np.random.RandomState, random.Random)
        ) or _is_of_torch(part):
            found.append(part)
        else:
            waiting.extend(_parts(part))
    return found


def _is_of_torch(part: Any) -> bool:
    return isinstance(part, torch.Generator) and part.device.type == "cpu"


def _parts(part: Any) -> Iterator[Any]:
    if isinstance(part, functools.partial):
        return iter((part.func, *part.args, *part.keywords.values()))
    if isinstance(part, Mapping):
        return islice(part.values(), MOST_ENTRIES)
    if isinstance(part, (list, tuple)):
        return islice(part, MOST_ENTRIES)
    owner = getattr(part, "__self__", None) if callable(part) else None  # of a bound method
    return iter((owner, *getattr(part, "__dict__", {}).values()))


def _state_of(generator: Any) -> Callable[[], Any]:
    """Return a function that puts the generator back where it is now."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
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
