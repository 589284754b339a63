"""The two bounds of the critical batch, worked by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest

from hessianflow.control import CriticalBatch
from hessianflow.interfaces import CurvatureReading, Decision, HessianFlowError, Progress


def reading(eigenvalue: float, *, converged: bool = True) -> CurvatureReading:
    return CurvatureReading(eigenvalue, 0.0, 5, converged, norm_mode="batch")


def step(
    controller: CriticalBatch,
    epoch: int,
    eigenvalue: float | None,
    loss: float,
    rate: float = 0.1,
    **changes: Any,
) -> Decision:
    """One update; `rate`: the scheduled one, which the trainer multiplies by the factor in
    force."""
    signals = {"epoch_loss": loss, "learning_rate": rate * controller.decision.lr_factor}
    measured = None if eigenvalue is None else reading(eigenvalue, **changes)
    return controller.update(Progress(epoch, epoch * 10_000, 0, 10_000, 24), measured, signals)


def test_the_loss_bound_follows_the_power_of_its_fall() -> None:
    """Power 2. Means of 4 and 2 are sqrt(2) at the end: 8 times; standing still at 2 gives 4; 2 and
    0.5 are 0.25."""
    controller = CriticalBatch(128, 2048, loss_power=2, edge_share=None, max_growth=100)
    assert controller.needs == {"epoch_loss"}
    assert step(controller, 1, None, 4.0) == Decision(128)
    decision = step(controller, 2, None, 2.0)
    assert (decision.batch_size, decision.lr_factor) == (1024, pytest.approx(8.0, rel=1e-12))
    assert decision.reason == "loss fell from 4 to 1.414 at the epoch's end"
    assert step(controller, 3, None, 2.0).setting == decision.setting
    assert (
        step(controller, 4, None, 0.5).reason
        == "loss fell from 4 to 0.25 at the epoch's end, capped"
    )
    assert controller.decision.batch_size == 2048
    assert controller.needs == frozenset()
    assert step(controller, 5, None, 0.1) == Decision(2048, 16.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 1e210), [128, 128]),
        ((1.0, 1e-300, 1e200), [128, 256, 256]),
        ((1e-20, 1e308), [128, 128]),
        ((1e308, 5e-324), [128, 256]),
    ],
)
def test_losses_of_any_size_have_a_bound(losses: tuple[float, ...], expected: list[int]) -> None:
    controller = CriticalBatch(128, 2048, edge_share=None)
    assert [
        step(controller, epoch, None, loss).batch_size for epoch, loss in enumerate(losses, 1)
    ] == expected


def test_another_loss_is_not_a_fall() -> None:
    """Power 1: from 3 to 2 is 1.84 times the batch, 3 / (2 * sqrt(2 / 3)); 3 / 2 where the means
    are of two losses."""
    for forget, size in ((False, 235), (True, 192)):
        controller = CriticalBatch(128, 2048, loss_power=1, edge_share=None)
        step(controller, 1, None, 3.0)
        if forget:
            controller.forget_reference()
        assert step(controller, 2, None, 2.0).batch_size == size


def test_names_of_a_state_are_checked() -> None:
    first, second = CriticalBatch(128, 2048, loss_power=1), CriticalBatch(128, 2048, loss_power=1)
    step(first, 1, 0.1, 3.0)
    with pytest.raises(HessianFlowError, match="state must come from CriticalBatch"):
        second.load_state_dict({**first.state_dict(), "other": 1})


def test_the_loss_is_carried_on_from_the_lowest() -> None:
    """Power 1: back at 4 after 8 nothing is gained; then 4 and 2.52 are 2 at the end: twice the
    batch."""
    controller = CriticalBatch(128, 2048, loss_power=1, edge_share=None)
    losses = [4.0, 8.0, 4.0, math.nan, 2.52]
    batches = [
        step(controller, epoch, None, loss).batch_size for epoch, loss in enumerate(losses, 1)
    ]
    assert batches == [128, 128, 128, 128, 256]


def test_the_edge_bound_is_a_share_of_the_stable_rate() -> None:
    """2 * 1.9 / 3.8 = 1; half of it over 0.1 is 5 times the batch; with a rate of 0.02, 25 times,
    capped."""
    controller = CriticalBatch(128, 2048, loss_power=None, edge_share=0.5, max_growth=100)
    assert controller.needs == {"eigenvalue", "learning_rate"}
    decision = step(controller, 1, 3.8, 1.0)
    assert (decision.batch_size, decision.lr_factor) == (640, 5.0)
    assert decision.reason == "eigenvalue 3.8 is stable up to a rate of 1"
    assert step(controller, 2, 3.8, 1.0) == Decision(640, 5.0)
    assert step(controller, 3, 3.8, 1.0, rate=0.02).batch_size == 2048


def test_the_smaller_bound_decides() -> None:
    controller = CriticalBatch(
        128, 2048, loss_power=1, edge_share=0.5, excess_power=0, max_growth=100
    )
    step(controller, 1, 3.8, 4.0)
    assert step(controller, 2, 3.8, 2.52).reason == "loss fell from 4 to 2 at the epoch's end"
    assert controller.decision.batch_size == 256
    decision = step(controller, 3, 3.8, 0.1)
    assert (decision.batch_size, decision.lr_factor) == (640, 5.0)
    assert decision.reason.startswith(
        "eigenvalue 3.8 (median of 3) is stable up to a rate of 1, the loss makes "
    )


def test_the_batch_outgrows_a_rate_that_stability_holds_back() -> None:
    """Share 0.5 of the edge at 1 over a rate of 0.1: 5 times; the loss makes 8 times useful, then
    16, then 19.

    At power 1/2 the batch goes to sqrt(5 * 8) times the first, the rate to 5 times. Where the
    eigenvalue has gone up, the rate stays, and the batch goes to sqrt(5 * 16) times. Where it has
    gone down, both go to 19 times.
    """
    controller = CriticalBatch(
        100, 2000, loss_power=1, edge_share=0.5, excess_power=0.5, max_growth=10, window=1
    )
    ends = [
        8.0,
        1.0,
        0.5,
        8 / 19,
    ]  # losses at the end of the epoch, of which an epoch's mean is a part
    means = [8.0]
    for end in ends[1:]:
        means.append((end * means[-1] ** 0.5) ** (2 / 3))
    expected = [(100, 1.0), (632, 5.0), (894, 5.0), (1900, 19.0)]
    for epoch, (mean, eigenvalue, setting) in enumerate(
        zip(means, (3.8, 3.8, 38.0, 0.038), expected, strict=True), 1
    ):
        decision = step(controller, epoch, eigenvalue, mean)
        assert (decision.batch_size, decision.lr_factor) == (
            setting[0],
            pytest.approx(setting[1], rel=1e-12),
        )
    assert controller.decision.reason.startswith("loss fell")


def test_a_state_keeps_a_rate_that_the_batch_has_outgrown() -> None:
    first, second = CriticalBatch(100, 2000, loss_power=1), CriticalBatch(100, 2000, loss_power=1)
    for epoch, loss in enumerate((8.0, 2.0, 0.5), 1):
        step(first, epoch, 38.0, loss)
    assert first.decision.lr_factor < first.decision.batch_size / 100
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.decision == first.decision
    assert step(second, 4, 3.8, 0.25) == step(first, 4, 3.8, 0.25)


def test_the_rate_stands_still_with_the_batch() -> None:
    """At the cap, and where the growth left is below the hysteresis: 1700 of 2000."""
    for size, cap in ((2000, 2000), (1700, 2000)):
        controller = CriticalBatch(
            100, cap, loss_power=1, edge_share=0.5, excess_power=1, max_growth=20, window=1
        )
        step(controller, 1, 38.0, 8.0)
        end = 8.0 / size * 100
        assert step(controller, 2, 38.0, (end * 8.0**0.5) ** (2 / 3)).setting[:2] == (size, 1.0)
        assert step(controller, 3, 0.38, 1e-3).setting[:2] == (size, 1.0)


def test_a_rate_held_back_returns_by_doublings() -> None:
    """Power 1: the batch is the loss's, the rate waits for the eigenvalue of 38, then goes 2, 4
    times."""
    controller = CriticalBatch(100, 2000, loss_power=1, edge_share=0.5, excess_power=1, window=1)
    steps = [(38.0, 8.0), (38.0, 2.0), (38.0, 2.0), (0.038, 1.0), (0.038, 0.5)]
    decisions = [step(controller, epoch, *measured) for epoch, measured in enumerate(steps, 1)]
    assert [decision.batch_size for decision in decisions] == [100, 200, 400, 800, 1600]
    assert [decision.lr_factor for decision in decisions] == [1, 1, 1, 2, 4]


def test_the_median_of_the_window_counts() -> None:
    controller = CriticalBatch(
        128, 2048, loss_power=None, edge_share=0.5, window=3, hysteresis=1, max_growth=100
    )
    assert step(controller, 1, 19.0, 1.0).batch_size == 128
    # median 9.5005: 2 * 1.9 / 9.5 / 2 / 0.1 = 2
    assert step(controller, 2, 0.001, 1.0).batch_size == 256
    assert step(controller, 3, 19.0, 1.0).batch_size == 256


def test_one_growth_is_at_most_a_doubling() -> None:
    controller = CriticalBatch(128, 2048, loss_power=None)
    assert [step(controller, epoch, 0.001, 1.0).batch_size for epoch in range(1, 6)] == [
        256,
        512,
        1024,
        2048,
        2048,
    ]


def test_growth_needs_the_hysteresis_and_never_turns_back() -> None:
    controller = CriticalBatch(100, 2000, loss_power=1, edge_share=None, hysteresis=1.25)
    step(controller, 1, None, 1.25)
    assert step(controller, 2, None, 1.25).batch_size == 100
    assert step(controller, 3, None, 1.1).batch_size == 100  # 1.1 * sqrt(1.1 / 1.25) = 1.03
    assert step(controller, 4, None, 1.0).batch_size == 131  # sqrt(1 / 1.1) = 0.953
    assert step(controller, 5, None, 5.0).batch_size == 131


def test_nothing_grows_while_the_rate_rises() -> None:
    """Edge 1, share 0.5: at a rate of 0.02 25 times the batch, but the full rate of 0.1 carries 5
    times alone.

    The loss makes 2 / (2 / 3) sqrt(3 / 2) times and more useful from the second epoch on.
    """
    controller = CriticalBatch(128, 2048, loss_power=2, edge_share=0.5)
    rates = [0.02, 0.06, 0.1, 0.1, 0.1, 0.1]
    batches = [
        step(controller, epoch, 3.8, 2.0 / epoch, rate).batch_size
        for epoch, rate in enumerate(rates, 1)
    ]
    assert batches == [128, 128, 128, 256, 512, 1024]
    tied = CriticalBatch(128, 2048, loss_power=2, edge_share=0.5, excess_power=0)
    batches = [
        step(tied, epoch, 3.8, 2.0 / epoch, rate).batch_size for epoch, rate in enumerate(rates, 1)
    ]
    assert batches == [128, 128, 128, 256, 512, 640]


def test_without_an_eigenvalue_no_fall_of_the_loss_lets_the_batch_grow() -> None:
    controller = CriticalBatch(128, 2048, edge_share=0.5)
    readings = [None, math.nan, -1.0]
    assert [
        step(controller, epoch, value, 2.0 / epoch**2).batch_size
        for epoch, value in enumerate(readings, 1)
    ] == [
        128,
        128,
        128,
    ]
    assert step(controller, 4, 3.8, 0.1).batch_size == 256


def test_a_scheduled_rate_of_zero_is_the_reason_where_the_loss_is_left_out() -> None:
    controller = CriticalBatch(128, 512, loss_power=None)
    assert step(controller, 1, 3.8, 1.0, rate=0.0) == Decision(
        256, 2.0, reason="the schedule's rate is 0"
    )


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_a_rate_without_a_meaning_allows_no_growth(rate: float) -> None:
    controller = CriticalBatch(128, 2048, loss_power=None)
    assert step(controller, 1, 3.8, 1.0, rate).batch_size == 128
    assert step(controller, 2, 3.8, 1.0).batch_size == 256


def test_the_smallest_growth_is_not_lost_to_rounding() -> None:
    """1.25 times 33 is 41.25, and 41 / 33 less than 1.25."""
    controller = CriticalBatch(33, 2048, loss_power=None, max_growth=1.25)
    assert [step(controller, epoch, 0.001, 1.0).batch_size for epoch in (1, 2)] == [41, 51]


@pytest.mark.parametrize("eigenvalue", [math.nan, math.inf, -3.0, 0.0, None])
def test_unusable_readings_are_passed_over(eigenvalue: float | None) -> None:
    controller = CriticalBatch(128, 2048, loss_power=None, edge_share=0.5, max_growth=100)
    assert step(controller, 1, eigenvalue, 1.0).batch_size == 128
    assert step(controller, 2, 3.8, 1.0, converged=False).batch_size == 128
    assert step(controller, 3, 3.8, 1.0).batch_size == 640


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0])
def test_a_loss_without_a_meaning_allows_no_growth(loss: float) -> None:
    controller = CriticalBatch(128, 2048, max_growth=100)
    assert step(controller, 1, 0.01, loss).batch_size == 128
    step(controller, 2, 0.01, 2.0)
    assert step(controller, 3, 0.01, loss).batch_size == 128
    assert step(controller, 4, 0.01, 1e-320).batch_size == 2048


def test_a_rate_of_zero_leaves_the_loss_to_decide() -> None:
    controller = CriticalBatch(128, 2048, loss_power=1)
    step(controller, 1, 3.8, 4.0)
    assert step(controller, 2, 3.8, 2.52, rate=0.0).batch_size == 256


def test_continues_from_its_state() -> None:
    first, second = CriticalBatch(128, 2048), CriticalBatch(128, 2048)
    step(first, 1, 6.0, 1.9)
    step(first, 2, 5.0, 1.6)
    second.load_state_dict(first.state_dict())
    assert second.decision == first.decision
    assert step(second, 3, 4.0, 1.4) == step(first, 3, 4.0, 1.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss_power": None, "edge_share": None},
            "loss_power and edge_share must not both be None",
        ),
        ({"edge_share": 1}, "momentum and edge_share must be < 1, got 0.9 and 1"),
        ({"momentum": 1}, "momentum and edge_share must be < 1, got 1 and 0.75"),
        ({"edge_share": 0}, "edge_share must be a finite number > 0 and <= 1, got 0"),
        ({"loss_power": -2}, "loss_power must be a finite number > 0, got -2"),
        ({"excess_power": -0.5}, "excess_power must be a finite number >= 0 and <= 1, got -0.5"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"max_growth": 1}, "max_growth must be a finite number > 1, got 1"),
        ({"max_growth": 1.2}, "max_growth must be >= hysteresis 1.25, got 1.2"),
        ({"hysteresis": 0.5}, "hysteresis must be a finite number >= 1, got 0.5"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        CriticalBatch(128, 2048, **arguments)


def test_a_missing_signal_is_named() -> None:
    with pytest.raises(HessianFlowError, match="signals must hold epoch_loss, got"):
        CriticalBatch(128, 2048).update(
            Progress(1, 1000, 0, 10_000, 24), reading(1.0), {"learning_rate": 0.1}
        )


@pytest.mark.parametrize("used", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_noise_near_the_edge_is_amplified_as_documented(used: float, momentum: float) -> None:
    """The stationary covariance of momentum SGD on one parabola, P = A P A' + b b', solved exactly.

    v <- m v + lambda x + noise, x <- x - rate v. The limit of small rates is rate / (2 lambda (1 -
    m)).
    """
    eigenvalue = 3.0
    rate = used * 2 * (1 + momentum) / eigenvalue
    a = np.array([[1 - rate * eigenvalue, -rate * momentum], [eigenvalue, momentum]])
    b = np.array([[-rate], [1.0]])
    covariance = np.linalg.solve(np.eye(4) - np.kron(a, a), (b @ b.T).reshape(4))
    small_rates = rate / (2 * eigenvalue * (1 - momentum))
    assert covariance[0] / small_rates == pytest.approx(1 / (1 - used), rel=1e-9)
