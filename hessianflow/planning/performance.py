"""Predict time and cost of a run on W workers, by a model of step times fed with measurements.

A step on a batch of B examples over W workers takes, with k = ceil(ceil(B / W) / m) microbatches of
at most m examples,

    compute      k * intercept + slope * ceil(B / W),
                 t(b) = slope * b + intercept: seconds of a microbatch of b
    all-reduce   2 ceil(log2 W) latency + 2 (W - 1)/W n / bandwidth,
                 n bytes of gradients, 0 for W = 1
    update       a constant

The cost of the all-reduce is that of Rabenseifner's algorithm (Thakur, Rabenseifner and Gropp,
Optimization of collective communication operations in MPICH, 2005). The model assumes no overlap: a
run that hides its sums behind backward passes is faster than predicted, by at most the fraction of
time given as `communication`.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hessianflow.control.time_model import TimeModel
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class AllReduceTime:
    """The time of a sum over workers.

    Attributes:
        latency: Seconds per message.
        bandwidth: Bytes per second between two workers.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: int, workers: int) -> float:
        """Return 2 ceil(log2 W) latency + 2 (W - 1)/W n / bandwidth."""
        if workers == 1:
            return 0.0
        crossings = 2 * (workers - 1) / workers  # of a worker's link by the data
        messages = 2 * math.ceil(math.log2(workers))
        return messages * self.latency + crossings * num_bytes / self.bandwidth


@dataclass(frozen=True)
class PerformanceModel:
    """The figures from which predictions are made.

    Attributes:
        step_time: Time of forward and backward on a microbatch, for one worker.
        all_reduce: Time of a sum over workers.
        gradient_bytes: Size of all gradients.
        microbatch_size: Largest microbatch that fits a worker.
        update_seconds: Seconds of one optimizer step.
        price: Price of one worker for one hour, in any currency.
        source: Origin of the numbers, in words, to be shown beside every prediction.
    """

    step_time: TimeModel
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
    """The predicted time and cost of a run on a number of workers.

    Attributes:
        workers: Number of workers held, in an elastic run the most that are ever held.
        seconds: Wall time.
        speedup: Wall time of one worker over that of this run.
        efficiency: Worker-seconds of one worker over those of this run; 1 is perfect.
        communication: Fraction of the wall time spent in all-reduces.
        worker_seconds: Sum over workers of the time for which they are held.
        cost: Worker-seconds at the model's price.
        updates: Optimizer steps.
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
    """Return time, efficiency and cost of a run for each number of workers.

    Args:
        model: Measured figures.
        phases: Phases of the run, for example one per batch size of a controller.
        workers: Numbers of workers to predict for.
        membership: "fixed" holds all workers throughout. "elastic" holds in each phase as many as
            get a full microbatch, min(W, max(1, B // m)).

    Raises:
        HessianFlowError: There is no phase, or a number is below 1.
    """
    if not phases:
        raise HessianFlowError("phases must hold at least one stretch of the run, got none")
    sizes = [size for phase in phases for size in (phase.examples, phase.batch_size)]
    least = min(*workers, model.microbatch_size, *sizes)
    if least < 1:
        raise HessianFlowError(f"workers, sizes and examples must be at least 1, got {least}")
    alone, *_ = _totals(model, phases, 1, "fixed")
    predictions = []
    for count in workers:
        seconds, communication, held, updates = _totals(model, phases, count, membership)
        prediction = Prediction(
            workers=count,
            seconds=seconds,
            speedup=alone / seconds,
            efficiency=alone / held,
            communication=communication / seconds,
            worker_seconds=held,
            cost=held * model.price / 3600,
            updates=updates,
        )
        predictions.append(prediction)
    return predictions


def measure_steps(
    step: Callable[[int], object], sizes: Sequence[int], *, repeats: int = 5
) -> list[float]:
    """Return the median seconds of `step(size)` for each size, after one warm-up call.

    On a CUDA device the step must wait for the device to finish.
    """
    medians = []
    for size in sizes:
        step(size)
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            step(size)
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return medians


def _totals(
    model: PerformanceModel, phases: Sequence[Phase], workers: int, membership: Membership
) -> tuple[float, float, float, int]:
    """Return seconds, seconds of all-reduces, worker-seconds and updates of a run."""
    line = model.step_time
    seconds = communication = held = 0.0
    updates = 0
    for phase in phases:
        count = workers
        if membership == "elastic":
            count = min(workers, max(1, phase.batch_size // model.microbatch_size))
        steps = math.ceil(phase.examples / phase.batch_size)
        shard = math.ceil(phase.batch_size / count)
        compute = math.ceil(shard / model.microbatch_size) * line.intercept + line.slope * shard
        exchange = model.all_reduce.seconds(model.gradient_bytes, count)
        step = compute + exchange + model.update_seconds
        seconds += steps * step
        communication += steps * exchange
        held += steps * step * count
        updates += steps
    return seconds, communication, held, updates
