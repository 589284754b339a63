import pytest

from hessianflow.control import TimeModel, fit_time_model
from hessianflow.planning.performance import (
    AllReduceTime,
    PerformanceModel,
    Phase,
    measure_steps,
    predict,
)

# 1 ms an example, 8 ms a microbatch of at most 16; 8 MB of gradients over 1 GB/s links with 0.5 ms
# a message.
MODEL = PerformanceModel(
    TimeModel(1e-3, 8e-3), AllReduceTime(5e-4, 1e9), 8_000_000, 16, update_seconds=4e-3, price=3.6
)


def test_one_and_four_workers_by_hand():
    """Batch 64. W=1: 4 microbatches, 32 + 64 ms, update 4: 100 ms. W=4: 8 + 16, all-reduce 2 +
    1.5*8, 4: 42 ms."""
    alone, four = predict(MODEL, [Phase(640, 64)], [1, 4])
    assert alone.seconds == pytest.approx(1.0)
    assert (alone.speedup, alone.efficiency, alone.communication, alone.updates) == (
        1.0,
        1.0,
        0.0,
        10,
    )
    assert four.seconds == pytest.approx(0.42)
    assert four.speedup == pytest.approx(1 / 0.42)
    assert four.efficiency == pytest.approx(1 / 1.68)
    assert four.communication == pytest.approx(14 / 42)
    assert four.worker_seconds == pytest.approx(1.68)
    assert four.cost == pytest.approx(1.68e-3)  # 3.6 an hour is a thousandth a second


def test_unequal_shares_and_a_short_last_batch():
    """65 examples on 4 workers: the largest share is 17, two microbatches; 130 and one example make
    3 updates."""
    (four,) = predict(MODEL, [Phase(131, 65)], [4])
    assert four.updates == 3
    assert four.seconds == pytest.approx(3 * (0.016 + 0.017 + 0.014 + 0.004))


def test_elastic_holds_only_workers_with_a_full_microbatch():
    """Batch 16 feeds one worker (8 + 16 + 4 ms a step), batch 64 all four (42 ms)."""
    phases = [Phase(160, 16), Phase(640, 64)]
    (elastic,) = predict(MODEL, phases, [4], membership="elastic")
    assert elastic.seconds == pytest.approx(10 * 0.028 + 10 * 0.042)
    assert elastic.worker_seconds == pytest.approx(10 * 0.028 + 4 * 10 * 0.042)
    (fixed,) = predict(MODEL, phases, [4])
    assert fixed.worker_seconds == pytest.approx(4 * fixed.seconds)


def test_more_workers_than_examples_cost_more_and_gain_nothing():
    few, many = predict(MODEL, [Phase(640, 8)], [8, 1024])
    assert many.seconds > few.seconds
    assert many.efficiency < few.efficiency / 100


def test_the_line_survives_an_outlier():
    """One of five measurements is 3 times the line: it is off by 2 of its own 3 parts."""
    sizes = [8, 16, 32, 64, 128]
    seconds = [0.01 + 0.002 * size for size in sizes]
    clean = fit_time_model(sizes, seconds, clip_intercept=True)
    assert (clean.slope, clean.intercept) == pytest.approx((0.002, 0.01))
    assert clean.residual < 1e-12
    seconds[2] *= 3
    disturbed = fit_time_model(sizes, seconds, clip_intercept=True)
    assert disturbed.slope == pytest.approx(0.002, rel=1e-9)
    assert disturbed.residual == pytest.approx(2 / 3)


def test_a_negative_intercept_is_clipped_only_when_asked():
    """Through (1, 1) and (4, 7) goes 2 B - 1. Clipped to 2 B, it is off by 1 of 1 and 1 of 7."""
    clipped = fit_time_model([1, 4], [1.0, 7.0], clip_intercept=True)
    assert (clipped.slope, clipped.intercept, clipped.residual) == (2.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="got slope 2 and intercept -1"):
        fit_time_model([1, 4], [1.0, 7.0])


def test_measuring_calls_what_it_measures():
    calls = []
    seconds = measure_steps(calls.append, [1, 2], repeats=3)
    assert calls == [1] * 4 + [2] * 4
    assert min(seconds) >= 0


def test_bad_input():
    with pytest.raises(ValueError, match="at least one stretch"):
        predict(MODEL, [], [1])
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        predict(MODEL, [Phase(640, 64)], [1, 0])
    with pytest.raises(ValueError, match=r"two different sizes, got \[8, 8\]"):
        fit_time_model([8, 8], [1.0, 1.1], clip_intercept=True)
    with pytest.raises(ValueError, match="the fitted line must rise"):
        fit_time_model([8, 16], [1.0, 0.5], clip_intercept=True)
