"""The number of workers for a batch, as pure functions of measurements."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hessianflow.interfaces import HessianFlowError

MIN_SAMPLES = 3
"""Samples needed to judge a number of workers: ours, since one stretch may hold an evaluation."""


@dataclass(frozen=True)
class Sample:
    """The measurement of one stretch of training.

    Attributes:
        seconds: Seconds from the start of the run to the end of the stretch.
        workers: Number of ranks that took part.
        batch_size: Examples per update.
        examples: Number of all examples trained so far.
        examples_per_second: Throughput of this stretch.
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
    """Return the number of workers that get a full microbatch each, or fewer if those are slow.

    The efficiency of n workers is (rate at n / n) / (rate at n0 / n0), where n0 is the fewest
    workers measured at the same batch size and rates are medians of the samples, at least
    :data:`MIN_SAMPLES` at n. If it is below `min_efficiency`, the result is at most the number of
    workers that would reach it at the rate then measured. Measurements are kept, so the result at
    one batch size does not oscillate.

    Args:
        batch_size: Examples per update, over all workers.
        microbatch_size: Largest microbatch that fits a worker.
        samples: Measurements so far; those at other batch sizes are ignored.
        min_workers, max_workers: Smallest and largest result.
        min_efficiency: Lowest efficiency that is accepted. This default is our choice.

    Raises:
        HessianFlowError: A number is below 1, or min_workers is above max_workers.
    """
    if min(batch_size, microbatch_size, min_workers) < 1 or min_workers > max_workers:
        raise HessianFlowError(
            "sizes and workers must be at least 1 and min_workers at most max_workers, got"
            f" batch_size {batch_size}, microbatch_size {microbatch_size}, min_workers"
            f" {min_workers}, max_workers {max_workers}"
        )
    full = min(max_workers, max(min_workers, batch_size // microbatch_size))
    rates = _rates_per_worker(samples, batch_size)
    if not rates:
        return full
    least = min_efficiency * statistics.median(rates[min(rates)])
    medians = {
        workers: statistics.median(own) for workers, own in rates.items() if len(own) >= MIN_SAMPLES
    }
    limits = [int(workers * rate / least) for workers, rate in medians.items() if rate < least]
    return max(min_workers, min([full, *limits]))


def slow_workers(busy_seconds: Sequence[float], *, factor: float = 2.0) -> list[int]:
    """Return the ranks that computed over `factor` (our choice) times the median of the others."""
    slow = []
    for rank, seconds in enumerate(busy_seconds):
        others = [*busy_seconds[:rank], *busy_seconds[rank + 1 :]]
        if others and seconds > factor * statistics.median(others):
            slow.append(rank)
    return slow


def _rates_per_worker(samples: Iterable[Sample], batch_size: int) -> dict[int, list[float]]:
    rates: dict[int, list[float]] = {}
    for sample in samples:
        if sample.batch_size == batch_size:
            rates.setdefault(sample.workers, []).append(sample.examples_per_second / sample.workers)
    return rates
