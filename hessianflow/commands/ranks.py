"""The processes that torchrun started for one command, or this one alone."""

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
"""A wait for other ranks that is longer is spoken of. Ours: ranks that were started together come
within seconds."""


@contextmanager
def launched(make: Callable[[], RunConfig]) -> Iterator[tuple[World, RunConfig]]:
    """Meet the other ranks, if this process is one of several, and leave them at the end.

    Args:
        make: the prepared settings; what is wrong with them, the first process of each machine
            says.

    Yields:
        The world, and the settings, `run_dir` apart the same on all ranks.

    Raises:
        HessianFlowError: ranks with different code or settings, and what :func:`launched_world`
            raises.
    """
    place = from_environment()
    try:
        config = make()
    except HessianFlowError as error:
        if place is not None and place.local_rank > 0:
            raise AgreedError(str(error)) from None
        raise
    if place is None:
        yield LocalWorld(), config
        return
    with ExitStack() as stack:
        with _said_to_wait(place), ended_at_once():
            world = stack.enter_context(launched_world(config.device))
        world.compare({name: value for name, value in to_dict(config).items() if name != "run_dir"})
        yield world, config


@contextmanager
def _said_to_wait(place: Generation) -> Iterator[None]:
    """While active, a long wait is spoken of: who has RANK in the environment may not know of
    others to wait for."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = (
        f"hessianflow: note: rank {place.rank} of {place.world_size} waits for the others at"
        f" {address}, as RANK, WORLD_SIZE and MASTER_ADDR in the environment say; unset RANK to"
        " train alone\n"
    )
    timer = Timer(PATIENCE_SECONDS, sys.stderr.write, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
