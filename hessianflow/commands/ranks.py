"""The processes that torchrun started for one command, or this one alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hessianflow.config import TrainConfig, to_dict
from hessianflow.distributed import from_environment, launched_world
from hessianflow.interfaces import AgreedError, HessianFlowError, World
from hessianflow.training.world import LocalWorld


@contextmanager
def launched(make: Callable[[], TrainConfig]) -> Iterator[tuple[World, TrainConfig]]:
    """Meet the other ranks, if this process is one of several, and leave them at the end.

    Args:
        make: the prepared settings; what is wrong with them, the first process of each machine says.

    Yields:
        The world, and the settings, `run_dir` apart the same on all ranks.

    Raises:
        HessianFlowError: ranks with different code or settings, and what :func:`launched_world` raises.
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
    with launched_world(config.device) as world:
        world.compare({name: value for name, value in to_dict(config).items() if name != "run_dir"})
        yield world, config
