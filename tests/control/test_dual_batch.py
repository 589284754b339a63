"""Dual-batch plans against the published tables, and properties of every feasible plan."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessianflow.control import (
    DualBatchPlan,
    TimeModel,
    Worker,
    dual_batch_plan,
    fit_time_model,
    plan_workers,
)
from hessianflow.interfaces import HessianFlowError

COMPSAC = (0.00056607, 0.014041204118)  # seconds an example, seconds a step
R24, R32 = (3.5268e-4, 0.0147888), (5.05636e-4, 0.0155621)
R160, R224, R288 = (3.01354e-4, 0.0120368), (5.68377e-4, 0.0170509), (9.38717e-4, 0.0166600)
CIFAR, IMAGENET = 50_000, 1_281_167


def small_sizes(
    workers: int, examples: int, large: int, line: tuple[float, float], k: float, rule: str
) -> list[int]:
    plans = [
        dual_batch_plan(workers, small, examples, large, *line, k, rounding=rule)  # type: ignore[arg-type]
        for small in range(1, workers + 1)
    ]
    return [plan.small.batch_size for plan in plans if plan.small is not None]


@pytest.mark.parametrize(
    ("k", "large_examples", "examples", "factors"),
    [
        (1.05, 13125, [10625, 11875, 12291, 12500], [0.8095, 0.9048, 0.9365, 0.9524]),
        (1.10, 13750, [8750, 11250, 12083, 12500], [0.6364, 0.8182, 0.8788, 0.9091]),
    ],
)
def test_compsac_table(
    k: float, large_examples: int, examples: list[int], factors: list[float]
) -> None:
    for small, expected, factor in zip(range(1, 5), examples, factors, strict=True):
        plan = dual_batch_plan(4, small, CIFAR, 500, *COMPSAC, k, rounding="down")
        assert plan.base_seconds == pytest.approx(7.4269, abs=5e-5)
        assert plan.target_seconds == pytest.approx(k * plan.base_seconds)
        assert plan.small is not None
        assert plan.small.examples == expected
        assert plan.small.update_factor == pytest.approx(factor, abs=5e-5)
        assert (plan.large is None) == (small == 4)
        if plan.large is not None:
            assert (plan.large.examples, plan.large.update_factor) == (
                large_examples,
                pytest.approx(1),
            )
        assert [worker.small for worker in plan.workers] == [True] * small + [False] * (4 - small)


@pytest.mark.parametrize(
    ("workers", "examples", "large", "line", "k", "rule", "sizes"),
    [
        (4, CIFAR, 500, COMPSAC, 1.05, "down", [83, 154, 205, 242]),
        (4, CIFAR, 500, COMPSAC, 1.10, "down", [38, 87, 127, 160]),
        (8, CIFAR, 500, COMPSAC, 1.05, "down", [35, 83, 122, 154, 182, 205, 225, 242]),
        (8, CIFAR, 500, COMPSAC, 1.10, "down", [8, 38, 64, 87, 108, 127, 144, 160]),
        (4, CIFAR, 600, R24, 1.05, "nearest", [130, 230, 294, 340]),
        (4, CIFAR, 600, R24, 1.10, "nearest", [62, 136, 193, 237]),
        (4, CIFAR, 560, R32, 1.05, "nearest", [102, 185, 243, 286]),
        (4, CIFAR, 560, R32, 1.10, "nearest", [47, 106, 153, 192]),
        (4, IMAGENET, 2330, R160, 1.05, "nearest", [156, 322, 464, 587]),
        (4, IMAGENET, 2330, R160, 1.10, "nearest", [67, 164, 254, 336]),
        (4, IMAGENET, 1110, R224, 1.05, "nearest", [112, 222, 310, 383]),
        (4, IMAGENET, 1110, R224, 1.10, "nearest", [49, 118, 178, 231]),
        (4, IMAGENET, 740, R288, 1.05, "nearest", [67, 135, 190, 236]),
        (4, IMAGENET, 740, R288, 1.10, "nearest", [29, 71, 107, 140]),
    ],
)
def test_published_small_batches(
    workers: int,
    examples: int,
    large: int,
    line: tuple[float, float],
    k: float,
    rule: str,
    sizes: list[int],
) -> None:
    assert small_sizes(workers, examples, large, line, k, rule) == sizes


def test_both_kinds_finish_together() -> None:
    """r32, three small workers, k = 1.05, small batch 243."""
    plan = dual_batch_plan(4, 3, CIFAR, 560, *R32, 1.05)
    assert plan.large is not None
    assert plan.small is not None
    assert plan.small.batch_size == 243
    assert (plan.large.seconds, plan.small.seconds) == (
        pytest.approx(7.00121, 1e-6),
        pytest.approx(7.00248, 1e-6),
    )
    assert plan.imbalance == pytest.approx(1 - 7.00121 / 7.00248, rel=1e-2)
    assert (plan.large.steps, plan.small.steps) == (23, 51)


def test_predicted_gain_of_progressive_resolution() -> None:
    """Equal stages at every resolution over the highest one alone, all workers large: 0.8537 and
    0.6421."""

    def seconds(line: tuple[float, float], batch: int) -> float:
        return TimeModel(*line).seconds(1, batch)

    assert (seconds(R24, 600) / seconds(R32, 560) + 1) / 2 == pytest.approx(0.8537, abs=5e-5)
    full = seconds(R288, 740)
    assert (seconds(R160, 2330) / full + seconds(R224, 1110) / full + 1) / 3 == pytest.approx(
        0.6421, abs=5e-5
    )


def test_no_small_worker_is_plain_data_parallel() -> None:
    plan = dual_batch_plan(4, 0, CIFAR, 500, *COMPSAC, 1.4)
    assert plan.small is None
    assert plan.target_seconds == plan.base_seconds
    assert {(w.examples, w.batch_size, w.update_factor) for w in plan.workers} == {
        (12_500, 500, 1.0)
    }
    assert plan.imbalance == 0


lines = st.tuples(st.floats(1e-5, 1e-2), st.floats(1e-3, 0.1))


@st.composite
def feasible(
    draw: Callable[..., object],
) -> tuple[DualBatchPlan, int, float, tuple[float, float], int]:
    workers = draw(st.integers(1, 16))
    small = draw(st.integers(1, workers))  # type: ignore[arg-type]
    large = workers - small  # type: ignore[operator]
    highest = min(2.0, workers / large) if large else 2.0  # type: ignore[operator]
    k = 1 + draw(st.floats(0, 0.95)) * (highest - 1)  # type: ignore[operator]
    batch, line, examples = (
        draw(st.integers(8, 2048)),
        draw(lines),
        draw(st.integers(50_000, 2_000_000)),
    )
    return dual_batch_plan(workers, small, examples, batch, *line, k), examples, k, line, batch  # type: ignore


@given(feasible())
def test_every_feasible_plan(
    case: tuple[DualBatchPlan, int, float, tuple[float, float], int],
) -> None:
    """Up to rounding: all examples are used, all finish together; the small batch is between 1 and
    the large one.

    Rounding d by 1/2 changes the sum by at most n/2; rounding B by 1/2 changes the time by b d (1/B
    - 1/(B + 1/2)), and a batch held at 1 may only be slower than planned.
    """
    plan, examples, k, (slope, intercept), batch = case
    n = len(plan.workers)
    assert abs(sum(worker.examples for worker in plan.workers) - examples) <= n / 2
    assert plan.target_seconds == pytest.approx(k * (slope + intercept / batch) * examples / n)
    for worker in plan.workers:
        assert 1 <= worker.batch_size <= batch
        assert 0 < worker.update_factor <= 1 + 1e-12
        if worker.batch_size > 1:
            b, d = worker.batch_size, worker.examples
            slack = intercept * d * (1 / (b - 0.5) - 1 / b) * worker.small + slope + intercept
            assert abs(worker.seconds - plan.target_seconds) <= slack * (1 + 1e-9)


@given(st.integers(1, 12), st.integers(8, 1024), lines)
def test_no_extra_time_makes_all_batches_equal(
    workers: int, batch: int, line: tuple[float, float]
) -> None:
    """With examples that divide evenly, so that rounding the counts does not enter."""
    for small in range(1, workers + 1):
        plan = dual_batch_plan(workers, small, 5000 * workers, batch, *line, 1.0)
        assert {(w.examples, w.batch_size) for w in plan.workers} == {(5000, batch)}


def test_workers_of_different_speed() -> None:
    """Rates 100, 50, 50 examples/s: t0 = 1000 / 200 = 5 s; with k = 1.2 the large one takes 600,
    the others 200 each.

    A small worker of line 0.01 B + 0.5 (rate 50 at batch 50) needs 0.01 * 200 + 0.5 * 200 / B = 6:
    B = 25.
    """
    fast = Worker(TimeModel(0.005, 0.5), 100)
    slow = Worker(TimeModel(0.01, 0.5), 50, small=True)
    plan = plan_workers([fast, slow, slow], 1000, 1.2)
    assert (plan.base_seconds, plan.target_seconds) == (pytest.approx(5), pytest.approx(6))
    assert [(w.examples, w.batch_size, w.seconds) for w in plan.workers] == [
        (600, 100, pytest.approx(6)),
        (200, 25, pytest.approx(6)),
        (200, 25, pytest.approx(6)),
    ]
    assert plan.workers[1].update_factor == pytest.approx(200 / 300)


def test_floor_reports_the_balance_it_costs() -> None:
    """n = 8, one small worker, k = 1.1 gives a batch of 8; held at 32 the worker finishes early and
    waits."""
    free = dual_batch_plan(8, 1, CIFAR, 500, *COMPSAC, 1.1, rounding="down")
    held = dual_batch_plan(
        8, 1, CIFAR, 500, *COMPSAC, 1.1, rounding="down", min_small_batch_size=32
    )
    assert free.small is not None
    assert held.small is not None
    assert (free.small.batch_size, held.small.batch_size) == (8, 32)
    assert held.small.seconds == pytest.approx((COMPSAC[0] + COMPSAC[1] / 32) * 1875)
    assert held.imbalance == pytest.approx(1 - held.small.seconds / held.target_seconds, rel=1e-3)
    assert free.imbalance < 0.07 < held.imbalance


def test_infeasible_ratio_names_its_bound() -> None:
    with pytest.raises(
        HessianFlowError,
        match=r"extra_time_ratio must be < 1\.333 with 3 large of 4 workers, got 1\.4",
    ):
        dual_batch_plan(4, 1, CIFAR, 500, *COMPSAC, 1.4)


@pytest.mark.parametrize(
    ("small", "of_kind", "share"), [(3, False, 0.2625), (1, True, 0.2125), (0, False, 0.25)]
)
def test_published_shares_of_synchronous_workers(small: int, of_kind: bool, share: float) -> None:
    plan = dual_batch_plan(4, small, CIFAR, 500, *COMPSAC, 1.05)
    total = sum(worker.update_factor for worker in plan.workers)
    shares = {round(w.update_factor / total, 6) for w in plan.workers if w.small == of_kind}
    assert shares == {share}


def test_fit_of_an_exact_line() -> None:
    model = fit_time_model([5, 10, 20, 40], [0.01 + 0.002 * b for b in (5, 10, 20, 40)])
    assert (model.slope, model.intercept) == (pytest.approx(0.002), pytest.approx(0.01))
    assert model.residual < 1e-12
    assert (model.smallest, model.largest) == (5, 40)
    assert model.step_seconds(100) == pytest.approx(0.21)
    assert model.seconds(1000, 100) == pytest.approx(2.1)


def test_fit_resists_outliers() -> None:
    """Two of nine measurements ten times too slow do not move the line; the residual shows them."""
    sizes = list(range(10, 100, 10))
    seconds = [0.01 + 0.002 * b for b in sizes]
    seconds[2] *= 10
    seconds[7] *= 10
    model = fit_time_model(sizes, seconds)
    assert (model.slope, model.intercept) == (
        pytest.approx(0.002, rel=1e-6),
        pytest.approx(0.01, rel=1e-6),
    )
    assert model.residual == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dual_batch_plan(0, 0, 1, 1, 1, 1, 1),
            "num_workers must be a whole number >= 1, got 0",
        ),
        (
            lambda: dual_batch_plan(4, -1, 1, 1, 1, 1, 1),
            "num_small must be a whole number >= 0, got -1",
        ),
        (lambda: dual_batch_plan(4, 5, 1, 1, 1, 1, 1), "num_small must be <= num_workers 4, got 5"),
        (
            lambda: dual_batch_plan(4, 1, 0, 1, 1, 1, 1),
            "num_examples must be a whole number >= 1, got 0",
        ),
        (
            lambda: dual_batch_plan(4, 1, 1, 1, 1, 1, 1),
            "num_examples must give every worker at least one example",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 0, 1, 1, 1),
            "large_batch_size must be a whole number >= 1, got 0",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 0, 1, 1),
            "slope must be a finite number > 0, got 0",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 1, math.nan, 1),
            "intercept must be a finite number >= 0, got nan",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 1, 0, 1),
            "intercept must be a finite number > 0, got 0",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 1, 1, 0.9),
            "extra_time_ratio must be a finite number >= 1, got 0.9",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 1, 1, 1, min_small_batch_size=0),
            "min_small_batch_size must be a whole number >= 1, got 0",
        ),
        (
            lambda: dual_batch_plan(4, 1, 100, 1, 1, 1, 1, rounding="up"),  # type: ignore[arg-type]
            "rounding must be nearest or down, got 'up'",
        ),
        (lambda: plan_workers([], 1, 1), "workers must hold at least one worker, got none"),
        (lambda: fit_time_model([1, 2], [1.0]), "seconds must match the 2 batch_sizes, got 1"),
        (lambda: fit_time_model([4, 4], [1.0, 2.0]), r"at least two different sizes, got \[4, 4\]"),
        (
            lambda: fit_time_model([0, 4], [1.0, 2.0]),
            "batch_sizes must be a whole number >= 1, got 0",
        ),
        (
            lambda: fit_time_model([1, 4], [1.0, 0.0]),
            "seconds must be a finite number > 0, got 0.0",
        ),
        (
            lambda: fit_time_model([1, 4], [2.0, 1.0]),
            "must rise from a positive time, got slope -0.3333",
        ),
        (lambda: fit_time_model([1, 4], [1.0, 7.0]), "got slope 2 and intercept -1"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make()
