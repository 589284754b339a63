"""A world of any size in one process: every rank a thread, every sum exact.

The same functions run as under :func:`~hessianflow.distributed.launch.run_local`, so that code for
many ranks can be tried, and its numbers checked, on one machine. Sums are taken in float64 in the
order of ranks and rounded once, so the result does not depend on timing; for two ranks it is bit
for bit that of gloo.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError


def run_simulated(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run `function(reducer, *arguments)` as every rank of a simulated world, and return what each
    returned.

    Memory and work are those of `world_size` ranks. The global random generators are shared by all
    of them, so ranks that draw must use generators of their own.

    Raises:
        HessianFlowError: world_size below 1.
        Exception: whatever the lowest of the failing ranks raised.
    """
    if world_size < 1:
        raise HessianFlowError(f"world_size must be at least 1, got {world_size}")
    meeting = _Meeting(world_size)

    def run(rank: int) -> Any:
        try:
            return function(SimulatedReducer(rank, meeting), *arguments)
        except BaseException:
            meeting.close()
            raise

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(run, rank) for rank in range(world_size)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error  # that of a rank which failed by itself, before those that lost it
    return [future.result() for future in futures]


class SimulatedReducer:
    """How the ranks of a simulated world agree; made by :func:`run_simulated`."""

    def __init__(self, rank: int, meeting: "_Meeting") -> None:
        self._rank, self._meeting = rank, meeting

    @property
    def rank(self) -> int:
        """Of this thread."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._meeting.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        total = self._meeting.exchange(self._rank, tensor, _total)
        with torch.no_grad():
            tensor.copy_(total)
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """The sum is taken when it is waited for: hooks must not stop a thread that others need."""
        return lambda: self._summed(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value."""
        return self._meeting.exchange(self._rank, value, lambda values: values[0])

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a tensor by rank 0's, in place."""
        tensor.copy_(self._meeting.exchange(self._rank, tensor.clone(), lambda values: values[0]))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value."""
        return list(self._meeting.exchange(self._rank, value, list))

    def _summed(self, tensor: Tensor) -> None:
        self.sum(tensor)


class _Meeting:
    """Where the threads of a world wait for each other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._values: list[Any] = [None] * world_size
        self._combine: Callable[[list[Any]], Any] = list
        self._result: Any = None
        self._barrier = threading.Barrier(world_size, action=self._finish)

    def exchange(self, rank: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """What `combine` makes of all ranks' values, computed once when the last rank has come."""
        self._values[rank], self._combine = value, combine
        self._barrier.wait()
        # The next exchange needs this thread to come to it, and it takes the result with it: no
        # second wait is needed.
        return self._result

    def close(self) -> None:
        """Let no rank wait for one that has failed."""
        self._barrier.abort()

    def _finish(self) -> None:
        self._result = self._combine(list(self._values))


def _total(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    total = first.to(torch.float64) if first.is_floating_point() else first.clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total.to(first.dtype)
