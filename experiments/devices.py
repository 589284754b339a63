"""The GPUs that the processes of a grid share out among them."""

import os
from collections.abc import Sequence

import torch


def visible_devices() -> list[str]:
    """The GPUs of this machine by the names that CUDA_VISIBLE_DEVICES takes; those in it, where it
    is set."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def least_used(devices: Sequence[str], in_use: Sequence[str | None]) -> str | None:
    """The device that occurs least often in `in_use`, the first of several; None where there is
    none."""
    return min(devices, key=in_use.count, default=None)
