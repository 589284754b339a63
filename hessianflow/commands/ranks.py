"""The processes that torchrun started for one command, or this one alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hessianflow.config import TrainConfig, to_dict
from hessianflow.distributed import (
    GroupWorld,
    check_same_program,
    code_fingerprint,
    from_environment,
    local_device,
    process_group,
)
from hessianflow.interfaces import AgreedError, HessianFlowError, World
from hessianflow.training.world import LocalWorld

_OWN = ("run_dir",)
"""Settings that ranks need not have alike: rank 0's is used."""


@contextmanager
def launched(make: Callable[[], TrainConfig]) -> Iterator[tuple[World, TrainConfig]]:
    """Meet the other ranks, if this process is one of several, and leave them at the end.

    Args:
        make: the prepared settings; what is wrong with them, the first process of each machine says.

    Yields:
        The world, and the settings.

    Raises:
        HessianFlowError: ranks with different code or settings, or no device for this one; within: another rank failed.
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
    device = torch.device(config.device)
    if device.index is not None and place.world_size > 1:
        raise AgreedError(f"--device {config.device} is one device for {place.world_size} processes: use {device.type}")
    with process_group(place, local_device(config.device, place.local_rank)) as reducer:
        settings = {name: value for name, value in to_dict(config).items() if name not in _OWN}
        check_same_program(reducer, settings, code_fingerprint())
        try:
            yield GroupWorld(reducer), config
        except RuntimeError as error:
            if not any(name in str(error) for name in ("gloo", "NCCL", "ncclR")):
                raise
            raise HessianFlowError(f"another rank failed or was ended: {str(error).splitlines()[0]}") from None
