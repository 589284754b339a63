"""Ranks on this machine for a function, as torchrun starts them for a command.

:func:`run_local` starts processes. :func:`run_simulated` runs the same functions in threads of this
process, so that code for many ranks can be tried, and its numbers checked. Its sums are computed in
float64 in the order of ranks and rounded once, so the result does not depend on timing; for two
ranks it is bit for bit that of gloo.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.checks import check_count
from hessianflow.distributed.process_group import Generation, abort, enter, leave, local_device
from hessianflow.distributed.store import LOCAL, gloo_on_this_machine, serve
from hessianflow.interfaces import HessianFlowError

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "hessianflow.distributed.launch"]
"""Modules that the server which processes are forked from imports once."""


def run_local(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    device: str = "cpu",
    timeout_seconds: float = 60.0,
) -> list[Any]:
    """Run `function(reducer, *arguments)` as every rank of a new group, and return all results.

    Processes come from a server that has imported torch already: the first call takes seconds,
    later ones a fraction of a second. Results are in the order of ranks. If one rank fails the
    others are ended.

    Args:
        function: Function that can be imported by name from a module.
        world_size: Number of processes.
        arguments: Further arguments, which must be picklable.
        device: "cpu" (gloo), or "cuda" (NCCL, one device per process).
        timeout_seconds: Time limit of the whole run, and of each collective in it.

    Raises:
        HessianFlowError: A rank failed (the cause of the error holds its traceback), or did not
            finish in time.
    """
    check_count("world_size", world_size)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = serve()
    processes = []
    pipes = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        generation = Generation(0, rank, world_size, rank)
        job = (function, generation, store.port, arguments, device, timeout_seconds, theirs)
        process = context.Process(target=_run_rank, args=job, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()  # the ranks of a failed run may wait for ever
            process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        left_seconds = max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(waiting, timeout=left_seconds)
        if not ready:
            left = [rank for rank in range(len(pipes)) if rank not in results]
            raise HessianFlowError(
                f"ranks {left} did not finish in time: raise timeout_seconds, or look for a hang"
            )
        for rank in map(pipes.index, ready):
            results[rank] = _received(pipes[rank], rank)
    return [results[rank] for rank in range(len(pipes))]


def _received(pipe: Any, rank: int) -> Any:
    try:
        # Unpickling is safe here: only a process that this one started can write to the pipe.
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise HessianFlowError(
            f"rank {rank} died without a word (killed, or out of memory)"
        ) from None
    if not succeeded:
        last = value.strip().splitlines()[-1]
        raise HessianFlowError(f"rank {rank} failed: {last}") from RuntimeError(value)
    return value


def _run_rank(
    function: Callable[..., Any],
    generation: Generation,
    port: int,
    arguments: tuple[Any, ...],
    device: str,
    timeout_seconds: float,
    pipe: Any,
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // generation.world_size))
    try:
        store = TCPStore(LOCAL, port, is_master=False)
        own = local_device(device, generation.local_rank)
        with gloo_on_this_machine():
            reducer = enter(generation, store, own, timeout_seconds=timeout_seconds)
        result = function(reducer, *arguments)
        leave(collect=True)
        # Plain bytes: tensors must not share memory with a process that is about to end.
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        # The cause is sent before the group is aborted, since that makes the other ranks fail.
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        abort()
    pipe.close()


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
            meeting.barrier.abort()  # ends the waiting of all ranks
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
        self.barrier = threading.Barrier(world_size, action=self._finish)

    def exchange(self, rank: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Return `combine` of all ranks' values, computed once when the last rank has arrived."""
        self._values[rank] = value
        self._combine = combine
        self.barrier.wait()
        # No second wait is needed: the next exchange cannot end before this thread, which has read
        # the result, takes part in it.
        return self._result

    def _finish(self) -> None:
        self._result = self._combine(list(self._values))


def _total(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    total = first.to(torch.float64) if first.is_floating_point() else first.clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total.to(first.dtype)
