"""The device that trains, and the number formats it computes in."""

import warnings

import torch

from hessianflow.interfaces import HessianFlowError

LONGEST_REASON = 120
"""Most characters of torch's reason that an error repeats: some reasons list every device."""


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, or the processor if there is none.

    Raises:
        HessianFlowError: there is no such device here, or it cannot compute (such as "meta").
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names, which fail below
            device = torch.device(name)
            # A name that torch knows but has no backend for fails in several ways, from deep
            # inside.
            (torch.ones(1, device=device) + 1).item()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        cut = f"{reason[:LONGEST_REASON]}..." if len(reason) > LONGEST_REASON else reason
        raise HessianFlowError(
            f"--device {name} cannot be used here: {cut}; use cpu or auto"
        ) from None
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the device has arithmetic units for bfloat16: any other emulates it,
    slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )
