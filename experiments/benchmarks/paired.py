"""Time several ways of doing a thing in turn, and compare them within a round.

Every round times each way once, in an order that rotates. A slow spell of the machine hits both
sides of a ratio taken within a round, so the median of these ratios moves less than the ratio of
two medians; its quartiles say by how much. On a processor the clock is that of this process, in
which other programs take no part; on a GPU it is the wall's, and the GPU is waited for.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds that `work` took, and what it returned."""
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    value = work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began, value


def in_turn(
    ways: Mapping[str, Callable[[], Any]], rounds: int, *, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round.

    Args:
        ways: by name.
        rounds: that are counted.
        device: what the ways run on.
        warm_up: rounds before them that are not counted, in which buffers are made.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found, _ = timed(ways[name], device)
            if number >= 0:
                seconds[name].append(found)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of every round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Return median and quartiles as text: "1.020 (1.010-1.031)"."""
    low, middle, high = (form.format(value) for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low}-{high})"


def machine(device: str = "cpu", *facts: str) -> str:
    """Return one line on what was measured with: torch, device, threads, and further facts."""
    threads = f"{torch.get_num_threads()} thread(s)"
    return ", ".join((f"torch {torch.__version__}", device, threads, *facts))
