"""Memory that one training step frees is kept for the next.

The GNU C library gives large blocks back to the system as soon as they are freed. Every activation of a step on a
processor is such a block: asking for it anew, the system clears it page by page, in each step. Kept, the same blocks
serve all steps; the process then holds the most that it ever used, which it will need again.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names and numbers of malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed, for the rest of the process: `mallopt` (man 3 mallopt).

    No block gets a mapping of its own any more (M_MMAP_MAX = 0), and the heap is never trimmed
    (M_TRIM_THRESHOLD = -1). The command does this before it trains on a processor; from Python it is the caller's
    choice. It cannot be taken back, and has no effect on memory of a GPU. Gain and cost:
    experiments/benchmarks/training.md.

    Returns:
        Whether it was done: False where the C library knows no such setting (macOS, Windows, musl).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
