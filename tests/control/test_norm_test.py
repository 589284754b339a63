"""The norm test, against the sample variance that it is stated in and numbers worked by hand."""

import math
from typing import Any

import pytest
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)
from hypothesis import given
from hypothesis import strategies as st

from hessianflow import History
from hessianflow.control import NormTest
from hessianflow.interfaces import HessianFlowError, Progress


def progress(updates: int = 10) -> Progress:
    return Progress(0, 64 * updates, updates, 50_000, 10)


def moments(gradient_sq: float, noise: float, size: float = 64) -> dict[str, float]:
    """What an observer reports of batches in quarters, where E||g||^2 = gradient_sq + noise / b."""
    return {
        "small_gradient_sq": gradient_sq + 4 * noise / size,
        "small_batch_size": size / 4,
        "large_gradient_sq": gradient_sq + noise / size,
        "large_batch_size": size,
    }


def plain(**options: Any) -> NormTest:
    """The test as published: every batch by itself, every growth made."""
    published: dict[str, Any] = {"every_updates": 1, "smoothing": 0, "hysteresis": 1}
    return NormTest(64, 4096, **(published | options))


def test_a_batch_that_fails_becomes_what_the_formula_says() -> None:
    """S = 256, B = 64: variance 4 of a squared norm 1 + 4, above 0.25; ceil(256 / (0.25 * 5))."""
    decision = plain().update(progress(), None, moments(1, 256))
    assert (decision.batch_size, decision.lr_factor) == (205, 1)
    assert decision.reason == "norm test: variance 0.8 of the squared norm"


@pytest.mark.parametrize(("noise", "size"), [(16, 64), (21, 64), (22, 66)])
def test_a_batch_that_passes_stays(noise: float, size: int) -> None:
    """S / 64 against (1 + S / 64) / 4: equal at S = 64 / 3 = 21.3; ceil(22 / (0.25 * 1.34375))."""
    assert plain().update(progress(), None, moments(1, noise)).batch_size == size


def test_it_is_the_published_test_on_the_gradients_of_workers() -> None:
    """Four workers with 16 examples each, their gradients in two coordinates, mean (1, 2).

    Squared deviations 2, 2, 8, 8: the variance of the mean is 20 / 3 / 4, a third of the squared
    norm 5. With eta^2 = 0.16 the batch becomes 64 / 3 / 0.16 = 133.3, rounded up.
    """
    gradients = [(2, 3), (0, 1), (3, 0), (-1, 4)]
    deviations = [(x - 1) ** 2 + (y - 2) ** 2 for x, y in gradients]
    assert deviations == [2, 2, 8, 8]
    signals = {
        "small_gradient_sq": sum(x * x + y * y for x, y in gradients) / 4,
        "small_batch_size": 16.0,
        "large_gradient_sq": 5.0,
        "large_batch_size": 64.0,
    }
    decision = plain(eta=0.4).update(progress(), None, signals)
    assert decision.batch_size == 134
    assert decision.reason == "norm test: variance 0.3333 of the squared norm"


def test_a_gradient_of_noise_alone_multiplies_the_batch_by_one_over_eta_squared() -> None:
    assert plain().update(progress(), None, moments(0, 100)).batch_size == 256
    assert plain(eta=0.1).update(progress(), None, moments(0, 100)).batch_size == 4096


def test_it_comes_to_rest_at_a_multiple_of_the_noise_scale() -> None:
    """Noise scale 400, eta 0.5: at 3 * 400, and never above but for rounding."""
    controller = plain()
    sizes = []
    for update in range(1, 60):
        signals = moments(1, 400, controller.decision.batch_size)
        sizes.append(controller.update(progress(update), None, signals).batch_size)
    assert sizes[0] == 221, "400 / (0.25 * 7.25), rounded up"
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(1200, abs=1)


def test_it_never_shrinks() -> None:
    controller = plain()
    controller.update(progress(), None, moments(1, 256))
    assert controller.update(progress(20), None, moments(1, 1, 205)).batch_size == 205


def test_the_average_is_that_of_shares() -> None:
    """||G||^2 is 1/257 and 1/2 of ||G||^2 + S: the mean of both is 0.25195, after which the
    variance is 0.74805 / 64 = 0.01169 of the squared norm 0.26363, which passes."""
    controller = plain(smoothing=0.5, eta=0.9)
    controller.update(progress(), None, moments(1, 256))
    assert controller.decision.batch_size == 64, "0.8 is below 0.81"
    controller.update(progress(20), None, moments(1, 1))
    assert controller.state_dict()["signal_share"] == pytest.approx(0.251946, rel=1e-5)
    controller.forget_reference()
    controller.update(progress(30), None, moments(1, 1))
    assert controller.state_dict()["signal_share"] == pytest.approx(0.5)


def test_a_growth_below_the_hysteresis_is_not_made() -> None:
    """66 is 3 % above 64."""
    assert NormTest(64, 4096).update(progress(), None, moments(1, 22)).batch_size == 64


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_the_rate_follows_by_rule(rule: str, factor: float) -> None:
    decision = plain(lr_rule=rule).update(progress(), None, moments(0, 100))
    assert (decision.batch_size, decision.lr_factor) == (256, factor)


def test_it_is_due_every_few_updates_until_the_cap_is_reached() -> None:
    controller = NormTest(64, 128)
    assert [update for update in (9, 10, 11) if controller.is_due(progress(update))] == [10, 11]
    decision = controller.update(progress(10), None, moments(1, 256))
    assert (decision.batch_size, decision.reason[-8:]) == (128, ", capped")
    assert controller.needs == frozenset()
    assert not controller.is_due(progress(1000))
    assert controller.update(progress(1000)).reason == ""


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        (
            moments(1, 256) | {"small_batch_size": 64.0},
            "norm test unknown: microbatches are as large as the batch (64), use smaller ones",
        ),
        (moments(math.nan, 256), "norm test unknown: gradient moments are not finite"),
        (
            moments(0, 0),
            "norm test unknown: squared gradient norm of one example 0, must be positive",
        ),
    ],
)
def test_unusable_moments_change_nothing(signals: dict[str, float], reason: str) -> None:
    controller = plain()
    decision = controller.update(progress(), None, signals)
    assert (decision.batch_size, decision.reason) == (64, reason)
    assert controller.update(progress(20), None, moments(1, 256)).batch_size == 205


@given(st.floats(-10, 10), st.floats(-1e6, 1e6), st.floats(0.01, 0.99))
def test_it_stays_within_its_bounds(gradient_sq: float, noise: float, eta: float) -> None:
    controller = plain(eta=eta)
    controller.update(progress(), None, moments(1, 1))
    decision = controller.update(progress(20), None, moments(gradient_sq, noise))
    assert 64 <= decision.batch_size <= 4096
    assert decision.lr_factor == 1


def test_it_continues_from_its_state() -> None:
    first, second = (plain(smoothing=0.5) for _ in range(2))
    first.update(progress(10), None, moments(1, 256))
    second.load_state_dict(first.state_dict())
    expected = first.update(progress(20), None, moments(1, 900, 205))
    assert second.update(progress(20), None, moments(1, 900, 205)) == expected
    assert expected.batch_size > 205


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0}, "eta must be a finite number > 0 and <= 1, got 0"),
        ({"eta": 1}, "eta must be < 1, got 1: .* every batch would pass"),
        ({"eta": math.nan}, "eta must be a finite number"),
        ({"every_updates": 0}, "every_updates must be a whole number >= 1, got 0"),
        ({"smoothing": 1}, "smoothing must be < 1, got 1"),
        ({"smoothing": -0.1}, "smoothing must be a finite number >= 0 and <= 1, got -0.1"),
        ({"hysteresis": 0.5}, "hysteresis must be a finite number >= 1, got 0.5"),
        ({"lr_rule": "cubic"}, "lr_rule must be one of linear, sqrt, none, got 'cubic'"),
        ({"max_lr_factor": 0}, "max_lr_factor must be a finite number > 0, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        NormTest(64, 128, **options)


def test_bad_sizes_and_missing_signals_are_refused() -> None:
    with pytest.raises(HessianFlowError, match="max_batch_size must be >= batch_size 64, got 32"):
        NormTest(64, 32)
    with pytest.raises(HessianFlowError, match="must be <= the 50000 training examples, got 50001"):
        NormTest(64, 50_001).update(progress(), None, moments(1, 256))
    with pytest.raises(HessianFlowError, match=r"signals must hold .* \(hf.optim.GradientMoments"):
        NormTest(64, 128).update(progress())


def test_a_run_grows_where_its_recorded_gradients_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first growth follows from the moments in the record of the run."""
    options = ["--train-examples", "512", "--test-examples", "64", "--epochs", "2"]
    options += ["--batch-size", "16", "--plots", "false", "--run-dir", "run"]
    options += ["--adversary", "none", "--curvature", "off", "--controller", "norm-test"]
    options += ["--controller.eta", "0.4", "--controller.smoothing", "0"]
    status, _, err = run("train", *options, capsys=capsys)
    assert (status, err) == (0, "")
    history = History.load("run")
    growth = history.growths[0]
    (seen,) = (row for row in history.of_kind("signals") if row["updates"] == growth["updates"])
    large = seen["large_gradient_sq"]
    deviation = seen["small_gradient_sq"] - large
    variance = deviation / (seen["large_batch_size"] / seen["small_batch_size"] - 1)
    assert variance > 0.16 * large
    assert growth["to"] == math.ceil(16 * variance / (0.16 * large))
