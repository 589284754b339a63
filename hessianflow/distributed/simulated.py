"""A world of any size in one process, in which every rank is a thread and every sum is exact.

It runs the same functions as :func:`~hessianflow.distributed.launch.run_local`, so that code for
many ranks can be tried, and its numbers checked, on one machine. Sums are computed in float64 in
the order of ranks and rounded once, so the result does not depend on timing; for two ranks it is
bit for bit that of gloo.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hessianflow.checks import check_count


def run_simulated(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run `function(reducer, *arguments)` as every rank of a simulated world; return all results.

    Memory and work are those of `world_size` ranks. All ranks share the global random generators,
    so ranks that draw must use generators of their own.

    Raises:
        HessianFlowError: The argument `world_size` is below 1.
        Exception: The error of the lowest of the failing ranks.
    """
    check_count("world_size", world_size)
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
        raise error  # a rank's own failure comes before those of ranks that waited for it
    return [future.result() for future in futures]


class SimulatedReducer:
    """The reducer of a rank of a simulated world, made by :func:`run_simulated`."""

    def __init__(self, rank: int, meeting: "_Meeting") -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self._meeting = meeting

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in place."""
        total = self._meeting.exchange(self.rank, tensor, _total)
        with torch.no_grad():
            tensor.copy_(total)
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Return a function that sums, since a hook must not stop a thread that others need."""
        return lambda: self.sum(tensor)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's plain value."""
        return self._meeting.exchange(self.rank, value, lambda values: values[0])

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a tensor by rank 0's, in place."""
        tensor.copy_(self._meeting.exchange(self.rank, tensor.clone(), lambda values: values[0]))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks."""
        return list(self._meeting.exchange(self.rank, value, list))


class _Meeting:
    """A meeting point at which the threads of a world wait for each other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._values: list[Any] = [None] * world_size
        self._combine: Callable[[list[Any]], Any] = list
        self._result: Any = None
        self._barrier = threading.Barrier(world_size, action=self._finish)

    def exchange(self, rank: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Return `combine` of all ranks' values, computed once when the last rank has arrived."""
        self._values[rank] = value
        self._combine = combine
        self._barrier.wait()
        # No second wait is needed: the next exchange cannot end before this thread, which has read
        # the result, takes part in it.
        return self._result

    def close(self) -> None:
        """End the waiting of all ranks, after one has failed."""
        self._barrier.abort()

    def _finish(self) -> None:
        self._result = self._combine(list(self._values))


def _total(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    total = first.to(torch.float64) if first.is_floating_point() else first.clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total.to(first.dtype)
