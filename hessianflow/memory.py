"""Memory that one training step frees is kept for the next.

The GNU C library gives large blocks back to the system as soon as they are freed. Activations of a
step on a processor are such blocks: asking for one anew, the system clears it page by page, in
every step. Kept, the same memory serves all steps. Blocks above LARGEST are still given back, and
so are not left in pieces when the batch grows.
"""

import ctypes

LARGEST = 32 * 2**20
"""Bytes; the largest value that the library takes. 128 images of a ResNet-20 make blocks of 8
MiB."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and numbers of malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed, for the rest of the process: `mallopt` (man 3
    mallopt).

    Blocks up to LARGEST come from the heap (M_MMAP_THRESHOLD), and the heap is never trimmed
    (M_TRIM_THRESHOLD = -1), so the process goes on holding what it once used. It cannot be taken
    back, and has no effect on memory of a GPU. The command does this in every process that works on
    a processor, its Ray workers and the one that only attacks among them; from Python, nothing but
    this function and those processes does. Gain and cost: experiments/benchmarks/training.md.

    Returns:
        Whether the library took it: False where it knows no such setting (macOS, Windows, musl).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
