"""The setting of the allocator that keeps the memory that one training step frees for the next.

The GNU C library returns large blocks to the system as soon as they are freed. The activations of a
step on a processor are such blocks, and the system clears their pages again in every step. If they
are kept, the same memory serves all steps. Blocks above LARGEST are still returned, so that none
are left in pieces when the batch grows.
"""

import ctypes

LARGEST = 32 * 2**20
"""Largest block that is kept, in bytes: the most that the library allows. Blocks of ResNet-20 have
8 MiB at 128 images."""

# These names and numbers are those of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the rest of the process (`man 3 mallopt`).

    Blocks up to LARGEST come from the heap (M_MMAP_THRESHOLD), and the heap is never trimmed
    (M_TRIM_THRESHOLD = -1), so the process keeps all memory that it once used. The setting cannot
    be undone and does not affect the memory of a GPU. The command makes it on a processor, as do
    Ray workers and the process that only attacks; a program in Python calls this function for the
    same effect. Gain and cost are in experiments/benchmarks/training.md.

    Returns:
        Whether the library accepted the setting; False on macOS, Windows and musl.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
