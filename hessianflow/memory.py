"""A setting that keeps memory freed by one training step for the next.

The GNU C library returns large blocks to the system as soon as they are freed. On a CPU the
activations of a step are such blocks, and the system clears them page by page whenever they are
allocated again, in every step. If they are kept, the same memory serves all steps. Blocks above
LARGEST are still returned, so that they do not fragment the memory when the batch grows.
"""

import ctypes

LARGEST = 32 * 2**20
"""The largest kept block in bytes, which is the largest value that the library takes. 128 images of
a ResNet-20 make blocks of 8 MiB."""

# Names and numbers of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the rest of the process (man 3 mallopt).

    Blocks up to LARGEST come from the heap (M_MMAP_THRESHOLD), and the heap is never trimmed
    (M_TRIM_THRESHOLD = -1), so the process keeps the most memory that it has used. This cannot be
    undone and does not affect memory of a GPU. The command calls this function in every process
    that works on a CPU, including Ray workers and the process that only attacks; a Python program
    has to call it itself. experiments/benchmarks/training.md gives the gain and the cost.

    Returns:
        Whether the library took the settings: False on macOS, on Windows and with musl.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
