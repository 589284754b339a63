"""A diverged run goes back, undoes its last growth and stays below it; or stops, as asked."""

import math
import re
from pathlib import Path

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, Decision, HessianFlowError, History
from hessianflow.control import AdaBatch
from hessianflow.training import Divergence, Reporting
from hessianflow.training.divergence import hold, rate_rule


def trainer(
    run_dir: Path | None, poison_above: int, stop_at: int = 0, **options
) -> AdaptiveBatchTrainer:
    """The batch doubles after every epoch; one above `poison_above` makes the loss explode; may
    stop at a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    batches = bright_or_dark(64, 4)

    steps = []

    def poison(inputs, targets, progress):
        steps.append(1)
        if len(steps) == stop_at:
            made.request_stop()
        return (inputs * 1e9 if len(inputs) > poison_above else inputs), targets

    made = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn=F.cross_entropy,
        controller=AdaBatch(4, 32, every_epochs=1, lr_decay=1),
        transform=poison,
        epochs=5,
        run_dir=run_dir,
        **options,
    )
    return made


def test_rollback_undoes_the_growth_and_holds_the_batch(tmp_path: Path):
    history = trainer(tmp_path / "run", 8, divergence=Divergence("rollback")).fit()
    assert history.summary["status"] == "finished"
    assert history.summary["examples"] == 5 * 64
    sizes = [(r["from"], r["to"]) for r in history.of_kind("batch") if r["from"] != r["to"]]
    assert sizes == [(4, 8), (8, 16), (16, 8)]
    assert [e["event"] for e in history.of_kind("event")] == ["diverged", "rollback"]
    assert "held at 8" in history.of_kind("batch")[-1]["reason"]
    assert [r["batch_size"] for r in history.epochs] == [4, 8, 8, 8, 8]
    assert all(r["train_loss"] < 10 for r in history.epochs)
    # This controller grows the batch at the same rate, so holding it leaves the rate alone; at 32
    # it halves the rate.
    assert [r["lr"] for r in history.epochs] == pytest.approx([0.01] * 4 + [0.005])


def test_the_progress_bar_goes_back_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(
        tmp_path / "run",
        8,
        divergence=Divergence("rollback"),
        reporting=Reporting(show_progress=True),
    ).fit()
    assert re.findall(r"(\d+)%", capsys.readouterr().err)[-1] == "100"


def test_resume_keeps_the_cap(tmp_path: Path):
    # 16 + 8 steps to the growth that diverges, 1 that does, 4 in the epoch that is trained again.
    first = trainer(tmp_path / "run", 8, stop_at=16 + 8 + 1 + 4, divergence=Divergence("rollback"))
    assert first.fit().summary["status"] == "preempted"
    history = trainer(None, 8, divergence=Divergence("rollback")).resume(tmp_path / "run")
    assert history.summary["largest_batch"] == 8
    assert len([e for e in history.of_kind("event") if e["event"] == "diverged"]) == 1


def test_stops_when_asked_or_when_there_is_nothing_to_undo(tmp_path: Path):
    with pytest.raises(HessianFlowError, match="exploded, in epoch 3"):
        trainer(tmp_path / "a", 8).fit()
    with pytest.raises(HessianFlowError, match="exploded, in epoch 1"):
        trainer(tmp_path / "b", 3, divergence=Divergence("rollback")).fit()
    with pytest.raises(HessianFlowError, match="goes back to checkpoints: it needs a run_dir"):
        trainer(None, 8, divergence=Divergence("rollback")).fit()
    assert History.load(tmp_path / "a").of_kind("event")[-1]["event"] == "diverged"


def test_policy_counts_and_halves_what_it_cannot_undo():
    policy = Divergence("rollback", 2)
    growths = [{"from": 4, "to": 8}, {"from": 8, "to": 16}]
    assert policy.cap(growths, 0, None) == 8
    assert policy.cap(growths, 1, 8) == 4
    assert policy.cap(growths, 2, 4) is None
    assert policy.cap([], 0, None) is None
    assert Divergence().cap(growths, 0, None) is None


def test_hold_keeps_the_proportion():
    assert hold(Decision(16, 4.0, 0.1, "grew"), 8).setting == (8, 2.0, 0.1)
    assert hold(Decision(32, 4.0), 8, power=0.5).setting == (8, 2.0, 1.0)
    assert hold(Decision(32, 4.0), 8, power=0.0).setting == (8, 4.0, 1.0)
    assert hold(Decision(8, 4.0), 8) == Decision(8, 4.0)


def test_a_held_rate_stays_below_that_before_the_growth():
    """4 -> 8 at the same rate: p is 0, and a controller that then goes 2, 4, 8 times as fast is not
    followed."""
    power, factor = rate_rule([{"from": 4, "to": 8, "lr_factor": 1.0}])
    assert [hold(Decision(8, f), 4, power, factor).lr_factor for f in (0.5, 1.0, 2.0, 8.0)] == [
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    rows = [
        {"from": 800, "to": 1600, "lr_factor": 2.0},
        {"from": 1600, "to": 2000, "lr_factor": 4.0},
    ]
    assert hold(Decision(2000, 4.0), 1600, *rate_rule(rows)).lr_factor == 2.0, (
        "the growth is undone, rate and all"
    )


def test_nothing_is_held_without_a_cap():
    assert hold(Decision(8, 4.0), None) == Decision(8, 4.0)


def test_the_rate_rule_is_read_off_the_last_growth():
    """Worked by hand: 4 -> 16 at factors 1 -> 4, 1 -> 2 and 1 -> 1; then a growth after a step of
    the factor."""
    for factor, power in ((4.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.5, 0.0), (9.0, 1.0)):
        assert rate_rule([{"from": 4, "to": 16, "lr_factor": factor}]) == (
            pytest.approx(power),
            1.0,
        )
    rows = [{"from": 4, "to": 4, "lr_factor": 3.0}, {"from": 4, "to": 16, "lr_factor": 6.0}]
    later = {"from": 16, "to": 16, "lr_factor": 0.1}
    assert rate_rule([*rows, later]) == (pytest.approx(0.5), 3.0)
    assert rate_rule([{"from": 4, "to": 16, "lr_factor": 0.0}]) == (1.0, math.inf)
