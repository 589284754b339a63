"""Start ranks on this machine from Python, for a function, as torchrun does for a command."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
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
