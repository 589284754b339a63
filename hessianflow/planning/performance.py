"""What a run would take on W workers: a model of step times fed with measurements.

A step on a batch of B examples over W workers takes, with k = ceil(ceil(B / W) / m) microbatches of
at most m examples,

    compute      k * intercept + slope * ceil(B / W),
                 t(b) = slope * b + intercept: seconds of a microbatch of b
    all-reduce   2 ceil(log2 W) latency + 2 (W - 1)/W n / bandwidth,
                 n bytes of gradients, 0 for W = 1
    update       a constant

The all-reduce is Rabenseifner's algorithm as costed by Thakur, Rabenseifner and Gropp, Optimization
of collective communication operations in MPICH, 2005. Nothing overlaps, so a run that hides its
sums behind backward passes is faster than predicted, by at most the share of time given as
`communication`.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from hessianflow.distributed.reducers import GroupReducer
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class StepTime:
    """Seconds of forward and backward on one microbatch of b examples: slope * b + intercept.

    Attributes:
        slope: seconds an example.
        intercept: seconds a microbatch.
        residual: largest deviation of a measurement from the line, relative to it.
    """

    slope: float
    intercept: float
    residual: float = 0.0

    def seconds(self, examples: int, microbatch_size: int) -> float:
        """For so many examples in the fewest microbatches."""
        return math.ceil(examples / microbatch_size) * self.intercept + self.slope * examples


@dataclass(frozen=True)
class AllReduceTime:
    """Seconds of a sum over workers.

    Attributes:
        latency: seconds a message.
        bandwidth: bytes a second between two workers.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: int, workers: int) -> float:
        """2 ceil(log2 W) latency + 2 (W - 1)/W n / bandwidth."""
        if workers == 1:
            return 0.0
        return (
            2 * math.ceil(math.log2(workers)) * self.latency
            + _moved(workers) * num_bytes / self.bandwidth
        )


@dataclass(frozen=True)
class PerformanceModel:
    """Everything a prediction rests on.

    Attributes:
        step_time: of one worker.
        all_reduce: between workers.
        gradient_bytes: size of all gradients.
        microbatch_size: largest microbatch that fits a worker.
        update_seconds: of one optimizer step.
        price: of one worker for one hour, in any currency.
        source: where the numbers come from, in words, to be shown beside every prediction.
    """

    step_time: StepTime
    all_reduce: AllReduceTime
    gradient_bytes: int
    microbatch_size: int
    update_seconds: float = 0.0
    price: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run at one batch size."""

    examples: int
    batch_size: int


@dataclass(frozen=True)
class Prediction:
    """A run on (at most) so many workers.

    Attributes:
        workers: held, or with an elastic run the most that are ever held.
        seconds: wall time.
        speedup: against one worker.
        efficiency: worker-seconds of one worker over those of this run; 1 is perfect.
        communication: share of the wall time spent in all-reduces.
        worker_seconds: sum over workers of the time they are held.
        cost: worker-seconds at the model's price.
        updates: optimizer steps.
    """

    workers: int
    seconds: float
    speedup: float
    efficiency: float
    communication: float
    worker_seconds: float
    cost: float
    updates: int


Membership = Literal["fixed", "elastic"]


def predict(
    model: PerformanceModel,
    phases: Sequence[Phase],
    workers: Sequence[int],
    *,
    membership: Membership = "fixed",
) -> list[Prediction]:
    """Time, efficiency and cost of a run for each number of workers.

    Args:
        model: measured figures.
        phases: the run, e.g. one for each batch size a controller went through.
        workers: numbers of workers to predict for.
        membership: "fixed": all workers are held throughout. "elastic": each phase holds as many as
            can be given a full microbatch, min(W, max(1, B // m)).

    Raises:
        HessianFlowError: no phase, or a number below 1.
    """
    if not phases:
        raise HessianFlowError("phases must hold at least one stretch of the run, got none")
    numbers = [
        *workers,
        model.microbatch_size,
        *(n for p in phases for n in (p.examples, p.batch_size)),
    ]
    if min(numbers) < 1:
        raise HessianFlowError(
            f"workers, sizes and examples must be at least 1, got {min(numbers)}"
        )
    alone = _run(model, phases, 1, "fixed")
    return [_prediction(model, phases, count, membership, alone[0]) for count in workers]


def fit_step_time(sizes: Sequence[int], seconds: Sequence[float]) -> StepTime:
    """The line through measured seconds of microbatches, by Theil and Sen: the median slope between
    all pairs.

    One measurement in five may be far off (another job on the machine) without moving the line far.

    Raises:
        HessianFlowError: fewer than two different sizes, or a line that does not rise.
    """
    pairs = [
        (b1 - b0, t1 - t0)
        for (b0, t0), (b1, t1) in combinations(zip(sizes, seconds, strict=True), 2)
        if b0 != b1
    ]
    if not pairs:
        raise HessianFlowError(
            f"a line needs at least two different sizes, got {sorted(set(sizes))}"
        )
    slope = statistics.median(rise / run for run, rise in pairs)
    if not slope > 0:
        raise HessianFlowError(
            f"larger batches must take longer, got a slope of {slope:.3g} s: measure longer batches"
        )
    intercept = max(
        0.0, statistics.median(t - slope * b for b, t in zip(sizes, seconds, strict=True))
    )
    residual = max(
        abs(t / (slope * b + intercept) - 1) for b, t in zip(sizes, seconds, strict=True)
    )
    return StepTime(slope, intercept, residual)


def fit_all_reduce(workers: int, sizes: Sequence[int], seconds: Sequence[float]) -> AllReduceTime:
    """Latency and bandwidth from measured all-reduces of `sizes` bytes among 2 or more workers.

    Raises:
        HessianFlowError: one worker, or see :func:`fit_step_time`.
    """
    if workers < 2:
        raise HessianFlowError(
            f"an all-reduce is measured between at least 2 workers, got {workers}"
        )
    line = fit_step_time(sizes, seconds)
    return AllReduceTime(
        line.intercept / (2 * math.ceil(math.log2(workers))), _moved(workers) / line.slope
    )


def measure_all_reduce(
    reducer: GroupReducer,
    sizes: Sequence[int],
    *,
    repeats: int = 10,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Median seconds of an all-reduce of each of `sizes` bytes; all ranks take part, each with its
    own clock."""
    medians = []
    for size in sizes:
        tensor = torch.ones(max(1, size // 4), device=device)

        def reduce(tensor: Tensor = tensor) -> None:
            float(reducer.sum(tensor)[0])

        medians.append(_median_seconds(reduce, repeats))
    return medians


def measure_steps(
    step: Callable[[int], object], sizes: Sequence[int], *, repeats: int = 5
) -> list[float]:
    """Median seconds of `step(size)` after one warm-up call; on a CUDA device the step must wait
    for it to finish."""
    return [_median_seconds(lambda size=size: step(size), repeats) for size in sizes]  # type: ignore[misc]


def _median_seconds(action: Callable[[], object], repeats: int) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _moved(workers: int) -> float:
    """How often the data crosses a worker's link in one all-reduce."""
    return 2 * (workers - 1) / workers


def _prediction(
    model: PerformanceModel,
    phases: Sequence[Phase],
    workers: int,
    membership: Membership,
    alone: float,
) -> Prediction:
    seconds, communication, held, updates = _run(model, phases, workers, membership)
    return Prediction(
        workers=workers,
        seconds=seconds,
        speedup=alone / seconds,
        efficiency=alone / held,
        communication=communication / seconds,
        worker_seconds=held,
        cost=held * model.price / 3600,
        updates=updates,
    )


def _run(
    model: PerformanceModel, phases: Sequence[Phase], workers: int, membership: Membership
) -> tuple[float, float, float, int]:
    """Seconds, those of them in all-reduces, worker-seconds, updates."""
    seconds = communication = held = 0.0
    updates = 0
    for phase in phases:
        fit = max(1, phase.batch_size // model.microbatch_size)
        count = min(workers, fit) if membership == "elastic" else workers
        steps = math.ceil(phase.examples / phase.batch_size)
        share = math.ceil(phase.batch_size / count)
        exchange = model.all_reduce.seconds(model.gradient_bytes, count)
        step = (
            model.step_time.seconds(share, model.microbatch_size) + exchange + model.update_seconds
        )
        seconds += steps * step
        communication += steps * exchange
        held += steps * step * count
        updates += steps
    return seconds, communication, held, updates
