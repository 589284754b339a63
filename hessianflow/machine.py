"""The device that trains, and the number formats it computes in."""

import warnings

import torch

from hessianflow.bounds import shortened
from hessianflow.interfaces import HessianFlowError

LONGEST_REASON = 120
"""Most characters of the reason of torch that an error repeats; some reasons list every device."""


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, or the processor without one.

    Raises:
        HessianFlowError: There is no such device here, or it cannot compute (such as "meta").
    """
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    try:
        with warnings.catch_warnings():
            # Deprecated names, which torch warns about, fail below.
            warnings.simplefilter("ignore")
            device = torch.device(name)
            # A device that torch cannot compute on fails in several ways, deep inside.
            (torch.ones(1, device=device) + 1).item()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HessianFlowError(
            f"--device {name} cannot be used here: {shortened(reason, LONGEST_REASON)}; use cpu or"
            " auto"
        ) from None
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the device has arithmetic units for bfloat16, without which it is slow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
