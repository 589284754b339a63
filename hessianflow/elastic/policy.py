"""How many workers a batch deserves: pure functions of what has been measured."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hessianflow.interfaces import HessianFlowError

MIN_SAMPLES = 3
"""Samples of a world at a batch size that it takes to judge it: one stretch may hold an evaluation.
Ours."""


@dataclass(frozen=True)
class Sample:
    """What one stretch of training measured.

    Attributes:
        seconds: since the run began, when the stretch ended.
        workers: ranks that took part.
        batch_size: examples an update.
        examples: trained in all so far.
        examples_per_second: over this stretch.
    """

    seconds: float
    workers: int
    batch_size: int
    examples: int
    examples_per_second: float


def workers_for(
    batch_size: int,
    microbatch_size: int,
    samples: Iterable[Sample] = (),
    *,
    min_workers: int = 1,
    max_workers: int,
    min_efficiency: float = 0.5,
) -> int:
    """As many workers as get a full microbatch each, unless more have been seen not to pay.

    The efficiency of n workers is (rate at n / n) / (rate at n0 / n0), n0 being the fewest workers
    seen at the same batch size and rates medians of the samples, of which there must be
    :data:`MIN_SAMPLES` at n. Where it fell below `min_efficiency`, the answer is at most the number
    of workers that would reach it at the rate then measured. What was measured stays measured, so
    the answer at one batch size does not swing back and forth.

    Args:
        batch_size: examples an update, over all workers.
        microbatch_size: the largest that fits a worker.
        samples: measured so far; those at other batch sizes are not looked at.
        min_workers: never fewer.
        max_workers: never more.
        min_efficiency: worst use of a worker that is accepted. Default ours.

    Raises:
        HessianFlowError: a number below 1, or min_workers above max_workers.
    """
    if min(batch_size, microbatch_size, min_workers) < 1 or min_workers > max_workers:
        raise HessianFlowError(
            "sizes and workers must be at least 1 and min_workers at most max_workers, got"
            f" batch_size {batch_size}, microbatch_size {microbatch_size}, min_workers"
            f" {min_workers}, max_workers {max_workers}"
        )
    wanted = min(max_workers, max(min_workers, batch_size // microbatch_size))
    rates = _rates_per_worker(samples, batch_size)
    least = min_efficiency * statistics.median(rates[min(rates)]) if rates else 0.0
    judged = {
        workers: statistics.median(found)
        for workers, found in rates.items()
        if len(found) >= MIN_SAMPLES
    }
    limits = [int(workers * rate / least) for workers, rate in judged.items() if rate < least]
    return max(min_workers, min([wanted, *limits]))


def slow_workers(busy_seconds: Sequence[float], *, factor: float = 2.0) -> list[int]:
    """Ranks that computed more than `factor` times as long as the median of the others. Default
    ours."""
    found = []
    for rank, seconds in enumerate(busy_seconds):
        others = [*busy_seconds[:rank], *busy_seconds[rank + 1 :]]
        if others and seconds > factor * statistics.median(others):
            found.append(rank)
    return found


def _rates_per_worker(samples: Iterable[Sample], batch_size: int) -> dict[int, list[float]]:
    rates: dict[int, list[float]] = {}
    for sample in samples:
        if sample.batch_size == batch_size:
            rates.setdefault(sample.workers, []).append(sample.examples_per_second / sample.workers)
    return rates
