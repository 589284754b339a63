"""Controllers that follow gradient statistics, against numbers worked by hand."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessianflow.control import CABS, DiveBatch, NoiseScale, lr_factor
from hessianflow.control.diversity import gradient_diversity
from hessianflow.control.noise_scale import goodput, two_batch_estimate
from hessianflow.interfaces import BatchController, HessianFlowError, Progress

SECONDS = {64: 0.1 + 0.001 * 64, 256: 0.1 + 0.001 * 256, 512: 0.1 + 0.001 * 512}


def progress(epoch: int = 1, updates: int = 0, examples_per_epoch: int = 50_000) -> Progress:
    return Progress(epoch, epoch * examples_per_epoch, updates, examples_per_epoch, 100)


def moments(
    gradient_sq: float, noise: float, small: float = 16, large: float = 64
) -> dict[str, float]:
    """What an observer would report for E||g_b||^2 = gradient_sq + noise / b."""
    return {
        "small_gradient_sq": gradient_sq + noise / small,
        "small_batch_size": small,
        "large_gradient_sq": gradient_sq + noise / large,
        "large_batch_size": large,
    }


def test_two_batch_estimate() -> None:
    """Sizes 1 and 4, squared norms 5 and 2: ||G||^2 = 1 and S = 4."""
    signals = {
        "small_gradient_sq": 5.0,
        "small_batch_size": 1,
        "large_gradient_sq": 2.0,
        "large_batch_size": 4,
    }
    assert two_batch_estimate(signals) == pytest.approx((1, 4))


def test_goodput() -> None:
    """||G||^2 = 1, S = 256 (variance 4 at the initial batch 64), step time 0.1 + 0.001 b."""
    values = [goodput(size, seconds, 256, 64) for size, seconds in SECONDS.items()]
    assert values == pytest.approx([390.24, 449.44, 348.58], abs=5e-3)


def test_noise_scale_sets_the_batch() -> None:
    controller = NoiseScale(64, 1024)
    decision = controller.update(progress(), signals=moments(1, 256))
    assert (decision.batch_size, decision.lr_factor, decision.reason) == (256, 4, "noise scale 256")
    assert controller.update(progress(2), signals=moments(1, 256)).reason == ""


def test_noise_scale_averages_numerator_and_denominator_apart() -> None:
    """Shares 1/101 and 1/11 of ||G||^2: their mean 56/1111 gives 1055/56 = 18.84, not the mean of
    100 and 10."""
    controller = NoiseScale(64, 1024, min_batch_size=1, hysteresis=1)
    controller.update(progress(), signals=moments(1, 100))
    assert controller.update(progress(2), signals=moments(1, 10)).batch_size == 19


def test_noise_scale_does_not_depend_on_the_size_of_the_gradients() -> None:
    """Gradients a thousand times smaller in the second epoch: the same decisions as with the same
    size."""
    decisions = []
    for factor in (1, 1e-6):
        controller = NoiseScale(64, 1024, hysteresis=1)
        controller.update(progress(), signals=moments(1, 100))
        decisions.append(controller.update(progress(2), signals=moments(factor, 400 * factor)))
    assert decisions[0] == decisions[1]


def test_goodput_chooses_among_the_measured_sizes() -> None:
    controller = NoiseScale(64, 1024, seconds_per_batch={**SECONDS, 4096: 1.0})
    decision = controller.update(progress(), signals=moments(1, 256))
    assert (decision.batch_size, decision.lr_factor) == (256, 4)
    assert decision.reason == "best goodput 449.4 examples/s at 256, noise scale 256"


def test_undefined_noise_scale_keeps_the_batch_and_the_average() -> None:
    """Shares -3/297 then 12/300: the average 0.01495 contains the negative estimate; (1 - 0.01495)
    / 0.01495 = 65.9."""
    controller = NoiseScale(64, 1024, hysteresis=1)
    first = controller.update(progress(), signals=moments(-3, 300))
    assert first.batch_size == 64
    assert (
        first.reason
        == "noise scale undefined: ||G||^2 is -0.0101 of ||G||^2 + S, must be between 0 and 1"
    )
    assert controller.update(progress(2), signals=moments(12, 288)).batch_size == 66


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        (
            moments(1, 256, 64, 64),
            r"noise scale unknown: microbatches are as large as the batch \(64\), use smaller ones",
        ),
        (moments(math.nan, 256), "noise scale unknown: gradient moments are not finite"),
        (
            moments(1, -2, 1, 4),
            "noise scale unknown: squared gradient norm of one example -1, must be positive",
        ),
    ],
)
def test_unusable_moments_change_nothing(signals: dict[str, float], reason: str) -> None:
    controller = NoiseScale(64, 1024)
    decision = controller.update(progress(), signals=signals)
    assert decision.batch_size == 64
    assert decision.reason == reason.replace("\\", "")
    assert controller.update(progress(2), signals=moments(1, 256)).batch_size == 256


@pytest.mark.parametrize(
    ("noise", "size", "reason"),
    [
        (95, 64, ""),
        (97, 97, "noise scale 97"),
        (5000, 1024, "noise scale 5000, capped"),
        (3, 16, "noise scale 3, raised to the floor"),
        (43, 64, ""),
        (42, 42, "noise scale 42"),
    ],
)
def test_hysteresis_cap_and_floor(noise: float, size: int, reason: str) -> None:
    """From 64, changes by less than 1.5 (up to 96, down to 42.7) are not made."""
    decision = NoiseScale(64, 1024, min_batch_size=16).update(progress(), signals=moments(1, noise))
    assert (decision.batch_size, decision.reason) == (size, reason)
    assert decision.lr_factor == size / 64


@given(st.floats(-10, 10), st.floats(-1e6, 1e6), st.sampled_from(["linear", "sqrt", "none"]))
def test_noise_scale_stays_within_its_bounds(gradient_sq: float, noise: float, rule: str) -> None:
    controller = NoiseScale(64, 1024, min_batch_size=16, lr_rule=rule, max_lr_factor=3)  # type: ignore[arg-type]
    decision = controller.update(progress(), signals=moments(gradient_sq, noise))
    assert 16 <= decision.batch_size <= 1024
    assert 0.25 <= decision.lr_factor <= 3
    assert bool(decision.reason) or decision.batch_size == 64


def test_cabs_steady_state() -> None:
    """Rate 0.5, variance 400, loss 2: batch 100; the first step gives 0.5 * 20 / 1.05 = 9.52, hence
    the floor 16."""
    controller = CABS(32, every_updates=1, hysteresis=1)
    signals = {**moments(1, 400), "learning_rate": 0.5, "train_loss": 2.0}
    first = controller.update(progress(updates=1), signals=signals)
    assert first.batch_size == 16
    assert first.reason == "rate 0.5 * variance 20 / loss 1.05, raised to the floor"
    for update in range(2, 400):
        decision = controller.update(progress(updates=update), signals=signals)
    assert (decision.batch_size, decision.lr_factor) == (100, 1)


def test_cabs_is_due_by_updates_and_subtracts_the_loss_floor() -> None:
    controller = CABS(32, every_updates=5, smoothing=0, loss_floor=1.0)
    assert not controller.is_due(progress(updates=4))
    assert controller.is_due(progress(updates=5))
    signals = {**moments(1, 400), "learning_rate": 0.5, "train_loss": 2.0}
    assert controller.update(progress(updates=5), signals=signals).batch_size == 200
    assert not controller.is_due(progress(updates=9))
    assert controller.is_due(progress(updates=10))
    undefined = controller.update(progress(updates=10), signals={**signals, "train_loss": 1.0})
    assert undefined.batch_size == 200
    assert undefined.reason == "batch undefined: loss above its floor is 0, must be positive"


def test_cabs_ignores_what_is_not_finite() -> None:
    controller = CABS(32, smoothing=0)
    signals = {**moments(1, 400), "learning_rate": 0.5, "train_loss": math.nan}
    assert (
        "loss nan, rate 0.5 must be finite"
        in controller.update(progress(updates=1), signals=signals).reason
    )
    same = {**moments(1, 400, 8, 8), "learning_rate": 0.5, "train_loss": 1.0}
    assert controller.update(progress(updates=2), signals=same).reason.startswith(
        "variance unknown: microbatches"
    )
    assert controller.state_dict()["loss"] == 1


def test_gradient_diversity() -> None:
    """Orthogonal (1, 0) and (0, 1): 2 / 2; n times the same: n / n^2; cancelling: infinite."""
    assert gradient_diversity(2, 2) == 1
    assert gradient_diversity(7, 49) == pytest.approx(1 / 7)
    assert gradient_diversity(2, 0) == math.inf


def dive(
    gradient_sq: float, noise: float, square_of_sum: float, examples: float = 50_000
) -> dict[str, float]:
    return {
        **moments(gradient_sq, noise),
        "gradient_sum_sq": square_of_sum,
        "gradient_examples": examples,
    }


def test_divebatch_worked() -> None:
    """delta 0.02, N = 50000, GD = 1: 1000; then it never shrinks."""
    controller = DiveBatch(128)
    decision = controller.update(progress(), signals=dive(1, 3, 4 * 50_000))
    assert (decision.batch_size, decision.lr_factor) == (1000, 1000 / 128)
    assert decision.reason == "gradient diversity 1"
    assert controller.update(progress(2), signals=dive(1, 3, 40 * 50_000)).batch_size == 1000
    assert controller.needs


def test_divebatch_of_identical_gradients_stays() -> None:
    """GD = 1/n: the target is delta, far below the batch."""
    decision = DiveBatch(128).update(progress(), signals=dive(1, 0, 50_000.0**2))
    assert (decision.batch_size, decision.reason) == (128, "")


def test_divebatch_cap_and_unusable_figures() -> None:
    controller = DiveBatch(128, lr_rule="none")
    assert "not finite" in controller.update(progress(), signals=dive(math.nan, 3, 1)).reason
    assert controller.decision.batch_size == 128
    for square_of_sum, examples in (
        (0.0, 50_000),
        (math.nan, 50_000),
        (1.0, math.inf),
        (1.0, math.nan),
    ):
        decision = controller.update(progress(2), signals=dive(1, 3, square_of_sum, examples))
        assert (decision.batch_size, decision.lr_factor) == (128, 1)
        assert "is not finite" in decision.reason
    assert controller.update(progress(3), signals=dive(0, 0, 0)).batch_size == 128
    decision = controller.update(progress(4), signals=dive(1, 3, 1e-6))
    assert (decision.batch_size, decision.lr_factor) == (2048, 1)
    assert decision.reason == "gradient diversity 2e+11, capped"
    assert controller.needs == frozenset()
    assert controller.update(progress(5)).reason == ""


@pytest.mark.parametrize(
    ("controller", "signals"),
    [
        (NoiseScale(64, 1024, hysteresis=1), moments(1, 300)),
        (CABS(32, every_updates=1), {**moments(1, 400), "learning_rate": 0.5, "train_loss": 2.0}),
        (DiveBatch(128), dive(1, 3, 300_000)),
    ],
)
def test_saved_and_restored_continues_the_same(
    controller: BatchController, signals: dict[str, float]
) -> None:
    middle = [controller.update(progress(e, e), signals=signals) for e in range(1, 4)][-1]
    state = controller.state_dict()
    expected = [controller.update(progress(e, e), signals=signals) for e in range(4, 8)]
    controller.load_state_dict(state)
    assert controller.decision == middle
    assert [controller.update(progress(e, e), signals=signals) for e in range(4, 8)] == expected


@pytest.mark.parametrize(
    "make", [lambda: NoiseScale(64, 1024), lambda: CABS(32), lambda: DiveBatch(128)]
)
def test_a_missing_signal_names_itself_and_its_observer(
    make: Callable[[], BatchController],
) -> None:
    controller = make()
    signals = {**dive(1, 3, 4), "learning_rate": 0.1, "train_loss": 1.0}
    assert controller.needs <= signals.keys()
    for name in controller.needs:
        rest = {key: value for key, value in signals.items() if key != name}
        with pytest.raises(
            HessianFlowError,
            match=f"signals must hold {name}, got .* or attach the GradientObserver",
        ):
            make().update(progress(), signals=rest)


@pytest.mark.parametrize(
    ("rule", "cap", "factor"),
    [("linear", None, 4), ("sqrt", None, 2), ("none", None, 1), ("linear", 3.0, 3)],
)
def test_lr_rules(rule: str, cap: float | None, factor: float) -> None:
    assert lr_factor(512, 128, rule, max_factor=cap) == factor  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseScale(0, 1), "batch_size must be a whole number >= 1, got 0"),
        (lambda: NoiseScale(64, 32), "max_batch_size must be >= batch_size 64, got 32"),
        (
            lambda: NoiseScale(64, 128, min_batch_size=65),
            "min_batch_size must be <= batch_size 64, got 65",
        ),
        (
            lambda: NoiseScale(64, 128, min_batch_size=0),
            "min_batch_size must be a whole number >= 1, got 0",
        ),
        (
            lambda: NoiseScale(64, 128, hysteresis=0.9),
            "hysteresis must be a finite number >= 1, got 0.9",
        ),
        (
            lambda: NoiseScale(64, 128, smoothing=1.1),
            "smoothing must be a finite number >= 0 and <= 1, got 1.1",
        ),
        (
            lambda: NoiseScale(64, 128, lr_rule="cubic"),
            "lr_rule must be one of linear, sqrt, none, got 'cubic'",
        ),
        (
            lambda: NoiseScale(64, 128, max_lr_factor=0),
            "max_lr_factor must be a finite number > 0, got 0",
        ),
        (
            lambda: NoiseScale(64, 128, seconds_per_batch={32: 1.0}),
            r"hold a size from 64 to 128, got \[32\]",
        ),
        (
            lambda: NoiseScale(64, 128, seconds_per_batch={64: 0.0}),
            r"seconds_per_batch\[64\] must be a finite number > 0",
        ),
        (
            lambda: NoiseScale(64, 128, seconds_per_batch={0: 1.0}),
            "seconds_per_batch sizes must be a whole number >= 1",
        ),
        (lambda: CABS(32, scale=0), "scale must be a finite number > 0, got 0"),
        (lambda: CABS(32, loss_floor=math.nan), "loss_floor must be a finite number, got nan"),
        (lambda: CABS(32, every_updates=0), "every_updates must be a whole number >= 1, got 0"),
        (lambda: CABS(32, smoothing=-1), "smoothing must be a finite number >= 0 and <= 1, got -1"),
        (lambda: CABS(32, smoothing=1), "smoothing must be < 1, got 1"),
        (lambda: DiveBatch(128, delta=0), "delta must be a finite number > 0, got 0"),
        (lambda: lr_factor(1, 0), "reference_batch_size must be a whole number >= 1, got 0"),
        (
            lambda: lr_factor(1, 1, "cubic"),
            "lr_rule must be one of linear, sqrt, none, got 'cubic'",
        ),
        (lambda: lr_factor(1, 1, max_factor=0), "max_factor must be a finite number > 0, got 0"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make()
