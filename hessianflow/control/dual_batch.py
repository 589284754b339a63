"""Plans of dual-batch learning: the examples and the batch size of every worker.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092, and their COMPSAC 2022 paper.

Of n workers, n_S use a small batch and the other n_L the largest that fits, B_L. With the time
model t(B) = a B + b, D examples per epoch, and the extra-time ratio k >= 1:

    t0 = (a + b / B_L) D / n,    t1 = k t0,    d_L = k D / n,    d_S = (D - n_L d_L) / n_S,
    B_S = b / (t1 / d_S - a),

so that both kinds finish at t1. The server weighs a small worker's update by f = d_S / d_L. A plan
is feasible while k < n / n_L.

The extension to workers of different speed is our own: with r_i = 1 / (a_i + b_i / B_L,i) examples
per second and t0 = D / sum r, a large worker takes t1 r_i examples and the small ones share the
rest in proportion to r_i. Equal workers give the formulas above.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from hessianflow.checks import check_choice, check_count, check_number
from hessianflow.control.time_model import TimeModel
from hessianflow.facts import RunFacts
from hessianflow.interfaces.errors import HessianFlowError

Rounding = Literal["nearest", "down"]
ServerName = Literal["simulated", "ray"]
SynchronyName = Literal["asp", "bsp", "ssp"]


@dataclass(frozen=True)
class Worker:
    """The time model of one worker, the largest batch it holds, and whether it uses a small one."""

    time: TimeModel
    large_batch_size: int
    small: bool = False


@dataclass(frozen=True)
class WorkerPlan:
    """The work of one worker in an epoch.

    Attributes:
        small: Whether the worker uses the small batch.
        examples: Examples per epoch (d).
        batch_size: Examples per step (B).
        update_factor: Weight of the worker's update at the server (f); 1 for a large worker.
        seconds: Predicted seconds of the epoch.
    """

    small: bool
    examples: int
    batch_size: int
    update_factor: float
    seconds: float

    @property
    def steps(self) -> int:
        """Return the batches per epoch, rounded as in the published code; at least one."""
        return max(1, round(self.examples / self.batch_size))


@dataclass(frozen=True)
class DualBatchPlan:
    """The plans of all workers.

    Attributes:
        workers: One plan per worker, in the order of the workers.
        base_seconds: Predicted seconds of an epoch if all used their large batch (t0).
        target_seconds: Seconds after which all are to finish (t1).
    """

    workers: tuple[WorkerPlan, ...]
    base_seconds: float
    target_seconds: float

    @property
    def small(self) -> WorkerPlan | None:
        """Return the plan of the first small worker, or None."""
        return next((worker for worker in self.workers if worker.small), None)

    @property
    def large(self) -> WorkerPlan | None:
        """Return the plan of the first large worker, or None."""
        return next((worker for worker in self.workers if not worker.small), None)

    @property
    def one_device_seconds(self) -> float:
        """Return the predicted seconds of an epoch on one device where the workers take turns."""
        return sum(worker.seconds for worker in self.workers)

    @property
    def imbalance(self) -> float:
        """Return the share of the epoch that the first worker to finish waits for the last.

        It comes from rounding and from the floor of the small batch.
        """
        seconds = [worker.seconds for worker in self.workers]
        return 1 - min(seconds) / max(seconds)


def dual_batch_plan(
    num_workers: int,
    num_small: int,
    num_examples: int,
    large_batch_size: int,
    slope: float,
    intercept: float,
    extra_time_ratio: float,
    *,
    rounding: Rounding = "nearest",
    min_small_batch_size: int = 1,
) -> DualBatchPlan:
    """Plan for equal workers, the small ones first.

    Args:
        num_workers: Number of workers (n).
        num_small: Number of small workers (n_S), from 0 to `num_workers`.
        num_examples: Examples per epoch over all workers (D).
        large_batch_size: Examples per step of a large worker (B_L).
        slope: Seconds per example (a).
        intercept: Seconds per step (b).
        extra_time_ratio: Time of an epoch relative to one with large batches only (k; 1.05 and 1.1
            in the papers). With 1 all batches are equal.
        rounding: "nearest" as in the journal code, or "down" as in the COMPSAC code.
        min_small_batch_size: Smallest examples per step of a small worker; the cost in balance is
            `imbalance`.

    Raises:
        HessianFlowError: An argument is out of its bounds, or k is so large that the small workers
            would have no data.
    """
    check_count("num_workers", num_workers)
    check_count("num_small", num_small, 0)
    if num_small > num_workers:
        raise HessianFlowError(f"num_small must be <= num_workers {num_workers}, got {num_small}")
    time = TimeModel(slope, intercept)
    workers = [Worker(time, large_batch_size, index < num_small) for index in range(num_workers)]
    plan = partial(plan_workers, rounding=rounding, min_small_batch_size=min_small_batch_size)
    return plan(workers, num_examples, extra_time_ratio)


def plan_workers(
    workers: Sequence[Worker],
    num_examples: int,
    extra_time_ratio: float,
    *,
    rounding: Rounding = "nearest",
    min_small_batch_size: int = 1,
) -> DualBatchPlan:
    """Plan for workers that differ in speed or memory.

    Options and errors are those of :func:`dual_batch_plan`.
    """
    check_count("num_examples", num_examples)
    check_number("extra_time_ratio", extra_time_ratio, low=1)
    check_count("min_small_batch_size", min_small_batch_size)
    if rounding not in ("nearest", "down"):
        raise HessianFlowError(f"rounding must be nearest or down, got {rounding!r}")
    if not workers:
        raise HessianFlowError("workers must hold at least one worker, got none")
    for worker in workers:  # the small batch is proportional to the intercept
        check_number("intercept", worker.time.intercept, above=0)
    sizes = [check_count("large_batch_size", worker.large_batch_size) for worker in workers]
    rates = [1 / w.time.seconds(1, size) for w, size in zip(workers, sizes, strict=True)]
    base = num_examples / sum(rates)
    target = base
    # Extra time leaves examples over, which only small workers take.
    if any(w.small for w in workers):
        target *= extra_time_ratio
    left = _left_for_small(workers, rates, num_examples, target, extra_time_ratio)
    small_rate = sum(rate for w, rate in zip(workers, rates, strict=True) if w.small)
    plans = []
    for worker, rate in zip(workers, rates, strict=True):
        nominal = target * rate
        examples = left * rate / small_rate if worker.small else nominal
        plans.append(_plan(worker, examples, nominal, target, rounding, min_small_batch_size))
    return DualBatchPlan(tuple(plans), base, target)


def _left_for_small(
    workers: Sequence[Worker],
    rates: Sequence[float],
    num_examples: int,
    target: float,
    ratio: float,
) -> float:
    large_rate = sum(rate for w, rate in zip(workers, rates, strict=True) if not w.small)
    left = num_examples - target * large_rate
    if left <= 0 and any(w.small for w in workers):
        count = sum(not w.small for w in workers)
        raise HessianFlowError(
            f"extra_time_ratio must be < {sum(rates) / large_rate:.4g} with {count} large of"
            f" {len(workers)} workers, got {ratio:g}: the large ones would take all examples"
        )
    return left


def _plan(
    worker: Worker, examples: float, nominal: float, target: float, rounding: Rounding, floor: int
) -> WorkerPlan:
    """Return the plan of one worker, which would take `nominal` examples in its large batch."""
    size = worker.large_batch_size
    rounded = _rounded(examples, rounding)
    if rounded < 1:
        raise HessianFlowError(
            f"num_examples must give every worker at least one example, got {examples:.2g} for one"
        )
    if worker.small:
        size = max(_rounded(_small_size(worker, rounded, target), rounding), min(floor, size))
    seconds = worker.time.seconds(rounded, size)
    return WorkerPlan(worker.small, rounded, size, examples / nominal, seconds)


def _small_size(worker: Worker, rounded: int, target: float) -> float:
    """Return the batch in which the worker takes its examples by `target`, at most its large one.

    As in the published codes, it follows from the rounded number of examples.
    """
    spare = target / rounded - worker.time.slope
    if spare <= 0:  # rounding up a tiny number may leave no time for a step
        return worker.large_batch_size
    return min(worker.time.intercept / spare, worker.large_batch_size)


def _rounded(value: float, rounding: Rounding) -> int:
    if rounding == "nearest":
        return math.floor(value + 0.5)
    # The last bit of the computation must not turn a whole number into the one below.
    return math.floor(value * (1 + 1e-12))


class DualBatch:
    """Train some workers with a small batch and some with a large one, on a parameter server.

    These are the options of a run whose batches are planned beforehand: it decides nothing while it
    trains, and has no adversary.

    Args:
        batch_size: Examples per step of a large worker.
        workers: Number of workers (4 in the paper).
        small_workers: Number of workers with the small batch; null stands for all but one.
        extra_time: Time of an epoch relative to one with large batches only (1.05 in the paper).
        slope: Seconds per example, one value or one for each resolution; null stands for a
            measurement at the start.
        intercept: Seconds per step, given and measured together with `slope`.
        min_small_batch_size: Smallest examples per step of a small worker.
        server: Place of the parameter server. simulated is one process with a clock that follows
            slope and intercept; ray has one process per worker.
        synchrony: Order of the updates. asp mixes every push at once, as in the paper; bsp waits
            for all workers in every round; ssp is asp until a worker is too far ahead.

    Raises:
        HessianFlowError: There are more small workers than workers, the extra time leaves them no
            example, or only one of slope and intercept is given.
    """

    prefers: ClassVar[Mapping[str, str]] = {"adversary": "none"}

    def __init__(
        self,
        batch_size: int,
        *,
        workers: int = 4,
        small_workers: int | None = None,
        extra_time: float = 1.05,
        slope: float | Sequence[float] | None = None,
        intercept: float | Sequence[float] | None = None,
        min_small_batch_size: int = 1,
        server: ServerName = "simulated",
        synchrony: SynchronyName = "asp",
    ) -> None:
        self.batch_size = check_count("batch_size", batch_size)
        self.workers = check_count("workers", workers)
        if small_workers is None:
            small_workers = workers - 1
        self.small_workers = check_count("small_workers", small_workers, 0)
        self.extra_time = check_number("extra_time", extra_time, low=1)
        self.min_small_batch_size = check_count("min_small_batch_size", min_small_batch_size)
        self.slope = _line("slope", slope)
        self.intercept = _line("intercept", intercept)
        check_choice("server", server, get_args(ServerName))
        check_choice("synchrony", synchrony, get_args(SynchronyName))
        self.server = server
        self.synchrony = synchrony
        self._check()

    def _check(self) -> None:
        if (self.slope is None) != (self.intercept is None):
            raise HessianFlowError("slope and intercept make a line together: give both or neither")
        large = self.workers - self.small_workers
        if large < 0:
            raise HessianFlowError(
                f"small_workers {self.small_workers} is more than workers {self.workers}"
            )
        if self.small_workers and large and self.extra_time >= self.workers / large:
            raise HessianFlowError(
                f"extra_time must be less than {self.workers / large:.4g} (workers / large workers)"
                f" with {large} large of {self.workers} workers, got {self.extra_time:g}: they"
                " would take all examples"
            )

    @classmethod
    def refuses(cls, run: RunFacts, _options: Mapping[str, Any], /) -> str:
        """Return why dual batches do not go with an adversary."""
        if run.adversary != "none":
            return f"workers on a server train clean, leave --adversary {run.adversary} out"
        return ""


def _line(name: str, values: float | Sequence[float] | None) -> tuple[float, ...] | None:
    """Return one value, or several, as a tuple."""
    if values is None:
        return None
    if isinstance(values, Sequence):
        return tuple(check_number(name, value, above=0) for value in values)
    return (check_number(name, values, above=0),)
