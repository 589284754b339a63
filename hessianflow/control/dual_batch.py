"""Planning of dual-batch learning: which worker trains on how many examples in steps of which size.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092, and their COMPSAC 2022 paper.

Of n workers, n_S use a small batch and the others the largest that fits, B_L. With the time model
t(B) = a B + b, D examples an epoch, and k >= 1 the extra-time ratio:

    t0 = (a + b / B_L) D / n,    t1 = k t0,    d_L = k D / n,    d_S = (D - n_L d_L) / n_S,
    B_S = b / (t1 / d_S - a),

so that both kinds finish at t1; the server weighs a small worker's update by f = d_S / d_L.
Feasible while k < n / n_L.

Workers of different speed (ours): with r_i = 1 / (a_i + b_i / B_L,i) examples a second, t0 = D /
sum r, a large worker takes t1 r_i examples and the small ones share the rest in proportion to r_i.
Equal workers give the formulas above.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hessianflow.control.checks import check_count, check_number
from hessianflow.control.time_model import TimeModel
from hessianflow.facts import RunFacts
from hessianflow.interfaces.errors import HessianFlowError

Rounding = Literal["nearest", "down"]
ServerName = Literal["simulated", "ray"]
SynchronyName = Literal["asp", "bsp", "ssp"]


@dataclass(frozen=True)
class Worker:
    """One worker as it is: its time model, the largest batch it can hold, and whether it is to use
    a small one."""

    time: TimeModel
    large_batch_size: int
    small: bool = False


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker does in an epoch.

    Attributes:
        small: whether it uses the small batch.
        examples: examples an epoch (d).
        batch_size: examples a step (B).
        update_factor: weight of its update at the server (f); 1 for a large worker.
        seconds: predicted seconds of the epoch.
    """

    small: bool
    examples: int
    batch_size: int
    update_factor: float
    seconds: float

    @property
    def steps(self) -> int:
        """Whole batches an epoch, as the published code counts them; at least one."""
        return max(1, round(self.examples / self.batch_size))


@dataclass(frozen=True)
class DualBatchPlan:
    """The plan of every worker, small ones first as given.

    Attributes:
        workers: one plan a worker, in the order of the workers.
        base_seconds: predicted epoch if all used their large batch (t0).
        target_seconds: when all are to finish (t1).
    """

    workers: tuple[WorkerPlan, ...]
    base_seconds: float
    target_seconds: float

    @property
    def small(self) -> WorkerPlan | None:
        """The first small worker's plan."""
        return next((worker for worker in self.workers if worker.small), None)

    @property
    def large(self) -> WorkerPlan | None:
        """The first large worker's plan."""
        return next((worker for worker in self.workers if not worker.small), None)

    @property
    def one_device_seconds(self) -> float:
        """Predicted epoch on one device on which the workers take turns (dual batch on a single
        device)."""
        return sum(worker.seconds for worker in self.workers)

    @property
    def imbalance(self) -> float:
        """Share of the epoch that the first to finish waits for the last: rounding, or what a floor
        has cost."""
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
        num_workers: n.
        num_small: n_S, from 0 (all large) to `num_workers` (all small).
        num_examples: D, examples an epoch over all workers.
        large_batch_size: B_L.
        slope: a, seconds an example.
        intercept: b, seconds a step.
        extra_time_ratio: k; 1.05 and 1.1 in the papers. 1 makes all batches equal.
        rounding: "nearest" as in the journal code, "down" as in the COMPSAC code.
        min_small_batch_size: floor of the small batch; `imbalance` says what balance it costs.

    Raises:
        HessianFlowError: an argument is out of its bounds, or k too large for the small workers to
            have any data.
    """
    check_count("num_workers", num_workers)
    check_count("num_small", num_small, 0)
    if num_small > num_workers:
        raise HessianFlowError(f"num_small must be <= num_workers {num_workers}, got {num_small}")
    time = TimeModel(slope, intercept)
    workers = [Worker(time, large_batch_size, index < num_small) for index in range(num_workers)]
    return plan_workers(
        workers,
        num_examples,
        extra_time_ratio,
        rounding=rounding,
        min_small_batch_size=min_small_batch_size,
    )


def plan_workers(
    workers: Sequence[Worker],
    num_examples: int,
    extra_time_ratio: float,
    *,
    rounding: Rounding = "nearest",
    min_small_batch_size: int = 1,
) -> DualBatchPlan:
    """Plan for workers that differ in speed or memory; the options are those of
    :func:`dual_batch_plan`.

    Raises:
        HessianFlowError: as there.
    """
    check_count("num_examples", num_examples)
    check_number("extra_time_ratio", extra_time_ratio, low=1)
    check_count("min_small_batch_size", min_small_batch_size)
    if rounding not in ("nearest", "down"):
        raise HessianFlowError(f"rounding must be nearest or down, got {rounding!r}")
    if not workers:
        raise HessianFlowError("workers must hold at least one worker, got none")
    for worker in workers:  # the small batch is proportional to it
        check_number("intercept", worker.time.intercept, above=0)
    rates = [
        1 / w.time.seconds(1, check_count("large_batch_size", w.large_batch_size)) for w in workers
    ]
    base = num_examples / sum(rates)
    # Without small workers nobody takes the examples of those who are given more time.
    target = base * extra_time_ratio if any(w.small for w in workers) else base
    left = _left_for_small(workers, rates, num_examples, target, extra_time_ratio)
    small_rate = sum(rate for w, rate in zip(workers, rates, strict=True) if w.small)
    plans = []
    for worker, rate in zip(workers, rates, strict=True):
        examples = left * rate / small_rate if worker.small else target * rate
        plans.append(_plan(worker, examples, target * rate, target, rounding, min_small_batch_size))
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
    """`nominal`: the examples that the worker would take by `target` in its large batch."""
    size, rounded = worker.large_batch_size, _rounded(examples, rounding)
    if rounded < 1:
        raise HessianFlowError(
            f"num_examples must give every worker at least one example, got {examples:.2g} for one"
        )
    if worker.small:
        # From the rounded count, as the published codes do. Rounding up a tiny count may leave no
        # time for a step.
        spare = target / rounded - worker.time.slope
        exact = worker.time.intercept / spare if spare > 0 else math.inf
        size = max(_rounded(min(exact, size), rounding), min(floor, size))
    return WorkerPlan(
        worker.small, rounded, size, examples / nominal, worker.time.seconds(rounded, size)
    )


def _rounded(value: float, rounding: Rounding) -> int:
    # Rounding down must not lose a whole number to the last bit of its computation.
    return math.floor(value + 0.5) if rounding == "nearest" else math.floor(value * (1 + 1e-12))


def mixing_share(update_factor: float, rule: Literal["journal", "compsac"] = "journal") -> float:
    """Share of the worker's weights in the server's after one asynchronous push.

    "journal": f / (1 + f), from w_s = (w_s + f w) / (1 + f). "compsac": f / 2, from w_s = ((2 - f)
    w_s + f w) / 2.

    Raises:
        HessianFlowError: f outside (0, 1], or the rule unknown.
    """
    check_number("update_factor", update_factor, above=0, high=1)
    if rule not in ("journal", "compsac"):
        raise HessianFlowError(f"rule must be journal or compsac, got {rule!r}")
    return update_factor / (1 + update_factor) if rule == "journal" else update_factor / 2


def synchronous_shares(update_factors: Sequence[float]) -> tuple[float, ...]:
    """f_i / sum f, the shares of all workers' weights when the server waits for every one.

    Raises:
        HessianFlowError: no worker, or f outside (0, 1].
    """
    if not update_factors:
        raise HessianFlowError("update_factors must hold at least one factor, got none")
    total = sum(check_number("update_factor", factor, above=0, high=1) for factor in update_factors)
    return tuple(factor / total for factor in update_factors)


class DualBatch:
    """Some workers train with a small batch and some with a large one, on a parameter server.

    The options of a run that plans its batches beforehand; nothing is decided during one, and it
    has no adversary.

    Args:
        batch_size: examples per step of a large worker.
        workers: how many workers there are (4 in the paper).
        small_workers: how many of them use the small batch; None: all but one.
        extra_time: what an epoch may take, relative to one with large batches only (1.05 in the
            paper).
        slope: seconds an example, one value or one for each resolution; None: measured at the
            start.
        intercept: seconds a step, likewise.
        min_small_batch_size: floor of the small batch.
        server: simulated: in one process, on a clock that follows slope and intercept; ray: one
            process a worker.
        synchrony: asp: every push is mixed at once, as in the paper; bsp: rounds; ssp: asp until a
            worker is too far ahead.

    Raises:
        HessianFlowError: more small workers than workers, an extra time that leaves the small ones
            no example, or half a line of step times.
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
        """Return why dual batches do not go with a run."""
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
