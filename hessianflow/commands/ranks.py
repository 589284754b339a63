"""The ranks of a command: the processes that torchrun started, or a single one."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Timer

from hessianflow.commands.signals import ended_at_once
from hessianflow.config import RunConfig, to_dict
from hessianflow.distributed import Generation, from_environment, launched_world
from hessianflow.interfaces import AgreedError, HessianFlowError, World
from hessianflow.training.world import LocalWorld

PATIENCE_SECONDS = 10.0
"""Seconds of waiting for other ranks before a note. This default is our choice: ranks that are
started together arrive within seconds."""


@contextmanager
def launched(make: Callable[[], RunConfig]) -> Iterator[tuple[World, RunConfig]]:
    """Join the other ranks, if this process is one of several, and leave them at the end.

    An error of `make`, which returns the prepared settings, is reported by the first process of
    each machine. The settings yielded are the same on all ranks except for `run_dir`.

    Raises:
        HessianFlowError: The ranks differ in code or settings, or cannot reach each other.
    """
    generation = from_environment()
    try:
        config = make()
    except HessianFlowError as error:
        if generation is not None and generation.local_rank > 0:
            raise AgreedError(str(error)) from None
        raise
    if generation is None:
        yield LocalWorld(), config
        return
    with ExitStack() as stack:
        with _long_wait_noted(generation), ended_at_once():
            world = stack.enter_context(launched_world(config.device))
        world.compare({name: value for name, value in to_dict(config).items() if name != "run_dir"})
        yield world, config


@contextmanager
def _long_wait_noted(generation: Generation) -> Iterator[None]:
    """Print a note about a long wait while active.

    A user who has RANK in the environment by accident knows of no others to wait for.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = (
        f"hessianflow: note: rank {generation.rank} of {generation.world_size} waits for the others"
        f" at {address}, as RANK, WORLD_SIZE and MASTER_ADDR in the environment say; unset RANK to"
        " train alone\n"
    )
    timer = Timer(PATIENCE_SECONDS, sys.stderr.write, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
