"""Seesaw, against the exchange of the paper worked by hand, and the updates that it saves."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from command_runs import (
    in_a_folder_of_its_own,  # noqa: F401
    run,
)
from hypothesis import given
from hypothesis import strategies as st

from hessianflow import History
from hessianflow.config import TrainConfig
from hessianflow.control import Seesaw
from hessianflow.interfaces import Decision, HessianFlowError, Progress
from hessianflow.resolve import resolve

SIZE = 10_000


def at(controller: Seesaw, epochs: float, scheduled: float) -> Decision:
    """Show the controller the rate in force: the schedule's times its own factor."""
    rate = scheduled * controller.decision.lr_factor
    progress = Progress(int(epochs), round(epochs * SIZE), 0, SIZE, 24)
    return controller.update(progress, None, {"learning_rate": rate})


def trace(controller: Seesaw, rates: Sequence[float]) -> list[Decision]:
    return [at(controller, epoch + 0.01, rate) for epoch, rate in enumerate(rates)]


def test_each_halving_divides_the_rate_by_the_root_of_two_and_doubles_the_batch() -> None:
    """The worked case of the paper's abstract."""
    rates = [0.4, 0.2, 0.1, 0.05]
    decisions = trace(Seesaw(128, 4096), rates)
    assert [each.batch_size for each in decisions] == [128, 256, 512, 1024]
    in_force = [rate * each.lr_factor for rate, each in zip(rates, decisions, strict=True)]
    assert in_force == pytest.approx([0.4 / math.sqrt(2) ** k for k in range(4)])
    assert decisions[0].reason == ""
    assert decisions[1].reason == "scheduled rate 0.2 after a peak of 0.4"


def test_a_decay_by_five_is_exchanged_at_once() -> None:
    """Batch 5 times as large, rate over the root of 5."""
    decision = trace(Seesaw(128, 4096), [0.1, 0.02])[-1]
    assert decision.batch_size == 640
    assert 0.02 * decision.lr_factor == pytest.approx(0.1 / math.sqrt(5))


def test_for_sgd_the_batch_grows_instead_of_any_decay() -> None:
    rates = [0.4, 0.2, 0.1]
    decisions = trace(Seesaw(128, 4096, exchange="linear"), rates)
    assert [each.batch_size for each in decisions] == [128, 256, 512]
    assert [rate * each.lr_factor for rate, each in zip(rates, decisions, strict=True)] == [0.4] * 3


def test_small_decays_wait_until_they_make_one_of_the_growth() -> None:
    """Decays by 3/4: 1.33, 1.78, then 2.37 times 100 is the first change by 2 or more."""
    rates = [0.75**k for k in range(4)]
    assert [each.batch_size for each in trace(Seesaw(100, 4096), rates)] == [100, 100, 100, 237]
    finer = trace(Seesaw(100, 4096, growth=1.2), rates)
    assert [each.batch_size for each in finer] == [100, 133, 178, 237]


def test_at_the_cap_the_rate_falls_as_the_schedule_says() -> None:
    """Cap 3 times the batch: the rate is the schedule's times the root of 3 from there on."""
    decisions = trace(Seesaw(100, 300), [1, 0.25, 0.01, 0.0])
    assert [each.batch_size for each in decisions] == [100, 300, 300, 300]
    assert [each.lr_factor for each in decisions[1:]] == [math.sqrt(3)] * 3
    assert decisions[1].reason.endswith(", capped")


def test_a_warm_up_changes_nothing_and_decays_count_from_its_peak() -> None:
    decisions = trace(Seesaw(128, 4096), [0.0, 0.1, 0.25, 0.5, 0.25])
    assert [each.batch_size for each in decisions] == [128, 128, 128, 128, 256]


def test_a_schedule_that_starts_again_starts_again_with_the_first_batch() -> None:
    decisions = trace(Seesaw(128, 4096), [0.4, 0.1, 0.4])
    assert [each.batch_size for each in decisions] == [128, 512, 128]
    assert [each.lr_factor for each in decisions] == [1, 2, 1]


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_a_rate_that_is_none_changes_nothing_and_is_forgotten(rate: float) -> None:
    decisions = trace(Seesaw(128, 4096), [0.4, 0.2, rate, 0.2, 0.1])
    assert [each.batch_size for each in decisions] == [128, 256, 256, 256, 512]
    assert decisions[2].reason == f"rate {rate:.4g} is negative or not finite"


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=8), st.sampled_from(["sqrt", "linear"]))
def test_rate_over_the_root_of_the_batch_is_always_that_of_the_schedule(
    rates: list[float], exchange: Any
) -> None:
    """The invariant of the paper; for SGD the rate over the batch itself."""
    power = {"sqrt": 0.5, "linear": 1.0}[exchange]
    controller = Seesaw(64, 1024, growth=1.3, exchange=exchange)
    for rate, decision in zip(rates, trace(controller, rates), strict=True):
        assert 64 <= decision.batch_size <= 1024
        now = rate * decision.lr_factor / decision.batch_size**power
        assert now == pytest.approx(rate / 64**power)


def test_a_cosine_takes_two_over_pi_of_its_updates() -> None:
    """Of cos(pi t / 2), whose integral is 2 / pi: 36 % fewer updates, as the paper's abstract says.

    Growths by 2 % and looks at every hundredth of the run leave an error of about 1 %.
    """
    examples = 10_000_000
    controller = Seesaw(1000, examples // 10, growth=1.02)
    done = 0
    updates = 0
    while done < examples:
        done += controller.decision.batch_size
        updates += 1
        progress = Progress(0, done, updates, examples, 1)
        if done < examples and controller.is_due(progress):
            rate = math.cos(math.pi / 2 * done / examples) * controller.decision.lr_factor
            controller.update(progress, None, {"learning_rate": rate})
    assert updates / 10_000 == pytest.approx(2 / math.pi, rel=0.02)


def test_it_looks_after_the_first_update_of_every_epoch_and_a_hundred_times_a_run() -> None:
    """24 epochs have five looks each."""
    controller = Seesaw(100, 200)
    looks = []
    for update in range(1, 24 * 100):
        progress = Progress(update // 100, 100 * update, update, SIZE, 24)
        if controller.is_due(progress):
            looks.append(update)
            controller.update(progress, None, {"learning_rate": 0.1})
    assert looks[:6] == [1, 21, 41, 61, 81, 101]
    assert len(looks) == 5 * 24


def test_it_continues_from_its_state() -> None:
    first, second = (Seesaw(128, 4096) for _ in range(2))
    trace(first, [0.1, 0.4, 0.2])
    second.load_state_dict(first.state_dict())
    assert second.decision == first.decision
    assert at(second, 4, 0.1) == at(first, 4, 0.1) == Decision(512, 2, 1, first.decision.reason)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth": 1}, "growth must be a finite number > 1, got 1"),
        ({"growth": math.inf}, "growth must be a finite number > 1, got inf"),
        ({"exchange": "none"}, "exchange must be sqrt or linear, got 'none'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        Seesaw(64, 128, **options)


def test_bad_sizes_and_a_missing_rate_are_refused() -> None:
    with pytest.raises(HessianFlowError, match="max_batch_size must be >= batch_size 64, got 32"):
        Seesaw(64, 32)
    with pytest.raises(HessianFlowError, match="signals must hold learning_rate, got none"):
        Seesaw(64, 128).update(Progress(0, 64, 1, SIZE, 24))
    with pytest.raises(HessianFlowError, match="must be <= the 10000 training examples, got 10001"):
        at(Seesaw(64, SIZE + 1), 1, 0.1)


def test_the_command_takes_a_cosine_and_the_exchange_of_the_optimizer() -> None:
    for optimizer, exchange in (("sgd", "linear"), ("adamw", "sqrt"), ("lars", "sqrt")):
        config = resolve(TrainConfig(controller="seesaw", optimizer=optimizer))
        assert config.schedule.name == "cosine"
        assert config.controller.options["exchange"] == exchange
        assert config.lr_rule is None
        assert resolve(config) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "constant"}, "--schedule constant has none: use cosine, multistep"),
        ({"lr_rule": "none"}, "--lr-rule none would replace its own: use --controller.exchange"),
        (
            {
                "optimizer": "adamw",
                "controller": {"name": "seesaw", "exchange": "linear"},
            },
            "--controller.exchange linear diverges with adamw, .* use sqrt",
        ),
    ],
)
def test_what_has_no_decay_or_diverges_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HessianFlowError, match=f"--controller seesaw: .*{message}"):
        resolve(TrainConfig(**{"controller": "seesaw", **settings}))


def test_a_run_exchanges_its_milestone(capsys: pytest.CaptureFixture[str]) -> None:
    """The rate of adamw falls by 4 after epoch 1: batch 16 to 64, and rate over 2 instead.

    The look follows one update on 16 examples, and the 240 that are left take 4 more.
    """
    options = ["--train-examples", "256", "--test-examples", "64", "--epochs", "3"]
    options += ["--batch-size", "16", "--plots", "false", "--run-dir", "run"]
    options += ["--adversary", "none", "--curvature", "off", "--optimizer", "adamw"]
    options += ["--schedule", "multistep", "--schedule.milestones", "[1]"]
    options += ["--schedule.lr-decay", "0.25", "--controller", "seesaw"]
    status, _, err = run("train", *options, capsys=capsys)
    assert (status, err) == (0, "")
    history = History.load("run")
    assert [(row["from"], row["to"]) for row in history.growths] == [(16, 64)]
    assert history.growths[0]["reason"] == "scheduled rate 0.00025 after a peak of 0.001"
    assert [row["lr"] for row in history.epochs] == pytest.approx([0.001, 0.0005, 0.0005])
    assert [row["updates"] for row in history.epochs] == [16, 21, 25]
