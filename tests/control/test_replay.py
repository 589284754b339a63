"""Replays of hand-written records, checked against the same controllers fed directly."""

import json
import math
from typing import Any

import pytest

from hessianflow.control import (
    ABSA,
    CriticalBatch,
    FixedBatch,
    NoiseScale,
    NormTest,
    Warmup,
    replay,
)
from hessianflow.interfaces import CurvatureReading, HessianFlowError, Progress

EIGENVALUES = [100, 80, 50, 49, 25, 30, 12, 11]


def history(eigenvalues: list[Any], examples: int = 1024) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch, value in enumerate(eigenvalues, 1):
        at = {"epoch": epoch, "examples": epoch * examples}
        rows.append(
            {
                "kind": "curvature",
                **at,
                "eigenvalue": value,
                "residual": 0.1,
                "matvecs": 5,
                "converged": True,
            }
        )
        rows.append(
            {
                "kind": "batch",
                **at,
                "from": 128,
                "to": 999,
                "lr_factor": 7.0,
                "reason": "of another rule",
            }
        )
        rows.append(
            {"kind": "epoch", **at, "updates": 5, "batch_size": 128, "lr": 0.1, "train_loss": 2.0}
        )
    return json.loads(json.dumps(rows))


def test_worked_trace_and_its_updates() -> None:
    """Batches 128 for 3 epochs of 1024, 256 for 2, 512 for 2 and 1024 for 1: 24 + 8 + 4 + 1
    updates."""
    result = replay(history(EIGENVALUES), ABSA(128, 1024))
    assert [(step.epoch, step.decision.batch_size) for step in result.changes] == [
        (3, 256),
        (4, 256),
        (5, 512),
        (7, 1024),
    ]
    assert result.changes[0].decision.reason == "eigenvalue fell from 100 to 50 (<= 1/2)"
    assert result.changes[0].updates == 24
    assert result.updates == 24 + 8 + 4 + 1
    assert len(result.steps) == 7, "nothing is decided at the end"


def test_an_epoch_that_does_not_divide_counts_its_last_batch() -> None:
    assert replay(history([1.0, 1.0], examples=1000), FixedBatch(128)).updates == 16


def test_planned_epochs_and_size_may_be_given() -> None:
    """Eight recorded epochs of a plan of 40: the share is not yet switched off at the fourth."""
    result = replay(history(EIGENVALUES), ABSA(128, 1024), total_epochs=40)
    assert [step.epoch for step in result.changes] == [3, 5, 7]
    with pytest.raises(
        HessianFlowError, match="max_batch_size must be <= the 512 training examples"
    ):
        replay(history(EIGENVALUES), ABSA(128, 1024), examples_per_epoch=512)


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_reading_that_was_not_finite_stays_unusable(value: float | None) -> None:
    result = replay(history([100, value, 50]), ABSA(128, 1024), total_epochs=9)
    assert result.steps[1].decision.reason == "eigenvalue not used: not finite (nan)"
    assert result.steps[2].decision.batch_size == 256


def test_eigenvalues_of_another_matrix_are_not_compared_by_the_rule_for_the_hessian() -> None:
    rows = history([100, 40])
    assert len(replay(rows, ABSA(8, 64, patience=None), total_epochs=9).changes) == 1
    for row in rows:
        row["matrix"] = "preconditioned Hessian"
    found = replay(rows, ABSA(8, 64, patience=None), total_epochs=9)
    assert found.changes == ()
    reasons = {step.decision.reason for step in found.steps}
    assert reasons == {"eigenvalue not used: that of the preconditioned Hessian"}


def test_signals_are_read_from_any_row_of_the_moment() -> None:
    rows = history([1.0])
    moments = {
        "small_gradient_sq": 17.0,
        "small_batch_size": 16,
        "large_gradient_sq": 5.0,
        "large_batch_size": 64,
    }
    rows.append({"kind": "signals", "epoch": 1, "examples": 1024, **moments})
    result = replay(rows, NoiseScale(64, 1024), total_epochs=9)
    assert result.changes[0].decision.batch_size == 256
    wanted = (
        "the record holds no large_batch_size, large_gradient_sq, .* at epoch 1, by which"
        " NoiseScale decides"
    )
    with pytest.raises(HessianFlowError, match=wanted):
        replay(history([1.0, 1.0]), NoiseScale(64, 1024))


def test_a_controller_due_where_nothing_was_measured_decides_at_the_next_measurement() -> None:
    """Measured at 640 and 1280 examples, after 10 and 20 updates at batch 64.

    At batch 32 the epoch in between ends 12 updates after the first decision, when the next is due.
    """
    rows = history([1.0, 1.0])
    moments = {
        "small_gradient_sq": 17.0,
        "small_batch_size": 16,
        "large_gradient_sq": 5.0,
        "large_batch_size": 64,
    }
    for examples in (640, 1280):
        rows.append({"kind": "signals", "epoch": examples // 1024, "examples": examples, **moments})
    result = replay(rows, NormTest(32, 64, eta=0.9, every_updates=10))
    assert [step.examples for step in result.steps] == [640, 1280]


def test_nothing_is_decided_at_the_end() -> None:
    """The last epoch of a run has no signals: nobody asked for them. A record of half a run goes on
    to be decided."""
    rows = history([1.0])
    assert replay(rows, NoiseScale(64, 1024)).steps == ()
    assert len(replay(rows, ABSA(128, 1024), total_epochs=2).steps) == 1


def test_the_epoch_row_serves_as_loss_and_rate() -> None:
    """Loss 2 then 1, 0.7071 at the end: 2.83^(1 / 0.21) = 141 times the batch is allowed, one
    growth is twofold."""
    rows = [
        row if row["kind"] != "epoch" else {**row, "train_loss": 2 / row["epoch"]}
        for row in history([1.0, 1.0])
    ]
    result = replay(rows, CriticalBatch(128, 1024, edge_share=None), total_epochs=9)
    assert [(step.epoch, step.decision.batch_size) for step in result.changes] == [(2, 256)]
    assert result.changes[0].decision.reason == "loss fell from 2 to 0.7071 at the epoch's end"
    signals = {"kind": "signals", "epoch": 2, "examples": 2048, "epoch_loss": 2.0}
    assert (
        replay([*rows, signals], CriticalBatch(128, 1024, edge_share=None), total_epochs=9).changes
        == ()
    ), "what was recorded as a signal is one"


def test_the_rate_is_the_schedules_under_the_replayed_factor() -> None:
    """Edge 2 * 1.9 / 3.8 = 1, half of it over a scheduled rate of 0.1: five times the batch,
    whoever recorded the run.

    Fed directly, the trainer shows 0.1 times the controller's own factor.
    """
    direct, expected = CriticalBatch(128, 1024, loss_power=None, edge_share=0.5), []
    for epoch in range(1, 6):
        signals = {"learning_rate": 0.1 * direct.decision.lr_factor}
        reading = CurvatureReading(3.8, 0.1, 5, True, norm_mode="batch")
        expected.append(
            direct.update(Progress(epoch, epoch * 1024, 0, 1024, 5), reading, signals).batch_size
        )
    assert expected == [256, 512, 640, 640, 640]
    for recorded in (1.0, 4.0):
        rows = history([3.8] * 5)
        for row in rows:
            if row["kind"] == "epoch":
                row |= {"lr": 0.1 * recorded, "lr_factor": recorded}
        result = replay(
            rows, CriticalBatch(128, 1024, loss_power=None, edge_share=0.5), total_epochs=9
        )
        assert [step.decision.batch_size for step in result.steps] == expected


def test_old_records_tell_the_factor_by_their_decisions() -> None:
    """Recorded: factor 1 in the first epoch, 7 from the decision at its end on, as `history` writes
    it."""
    rows = history([3.8] * 3)
    for row in rows:
        if row["kind"] == "epoch":
            row["lr"] = 0.1 if row["epoch"] == 1 else 0.7
    for order in (rows, rows[::-1]):
        result = replay(
            order, CriticalBatch(128, 1024, loss_power=None, edge_share=0.5), total_epochs=9
        )
        assert [step.decision.batch_size for step in result.steps] == [256, 512, 640]


def test_the_size_of_an_epoch_is_read_where_epochs_end() -> None:
    rows = history([1.0, 1.0])
    rows.append({"kind": "signals", "epoch": 1, "examples": 1900, "x": 1.0})
    with pytest.raises(
        HessianFlowError, match="max_batch_size must be <= the 1024 training examples"
    ):
        replay(rows, ABSA(128, 2048))


def test_rates_by_progress_are_replayed_at_the_recorded_moments() -> None:
    result = replay(history([1.0] * 4), Warmup(128, 512, warmup_epochs=2))
    assert [step.decision.lr_factor for step in result.steps] == [2.5, 4]


def test_a_record_without_an_epoch_is_refused() -> None:
    with pytest.raises(
        HessianFlowError, match="rows must hold at least one record of a completed epoch, got none"
    ):
        replay([{"kind": "batch", "epoch": 1, "examples": 5, "lr_factor": 1.0}], FixedBatch(1))
    with pytest.raises(HessianFlowError, match="total_epochs must be a whole number >= 1, got 0"):
        replay(history([1.0]), FixedBatch(1), total_epochs=0)
