"""Whole dual-batch runs: what they leave behind, interrupted and resumed, in a simulation."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hessianflow import History
from hessianflow.config import TrainConfig
from hessianflow.control import TimeModel
from hessianflow.dual_batch import DualBatchTrainer, build_dual_batch
from hessianflow.dual_batch.build import plan_schedule
from hessianflow.dual_batch.local_training import FlatWeights, LocalTraining, checkable, with_arrays
from hessianflow.dual_batch.workers import all_stages, worker_of
from hessianflow.interfaces import Batch, HessianFlowError, StepResult
from hessianflow.parts import build_parts, load_config, load_parts, on_this_machine, prepare
from hessianflow.resolve import resolve
from hessianflow.runs import checkpoints
from hessianflow.training.evaluate import evaluate

SETTINGS = TrainConfig(
    data="fake",
    model="resnet8",
    controller={
        "name": "dual-batch",
        "slope": (1e-3, 2e-3),
        "intercept": (0.02, 0.02),
        "workers": 4,
        "small_workers": 2,
        "extra_time": 1.1,
    },
    train_examples=400,
    test_examples=100,
    batch_size=25,
    epochs=4,
    schedule={"name": "multistep", "milestones": (2,)},
    lr=0.02,
    resolution="cyclic",
    dropouts=(0.1, 0.2),
    device="cpu",
    threads=1,
)


CONSTANT = {"schedule": "constant"}


def plan(**options: object) -> dict[str, object]:
    """The controller of the settings above with other options."""
    return {"controller": SETTINGS.controller.with_options(**options)}


def trainer(run_dir: Path | str, **changes: object) -> DualBatchTrainer:
    return build_dual_batch(prepare(replace(SETTINGS, run_dir=str(run_dir), **changes)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> History:
    return trainer(tmp_path_factory.mktemp("runs") / "whole").fit()


def test_the_records_of_a_run(whole: History) -> None:
    """Stages 12, 16, 12, 16 pixels of one epoch each; times by hand from the plan, which its own
    tests check."""
    config = json.loads((whole.run_dir / "config.json").read_text())  # type: ignore[operator]
    plans = config["dual_batch"]["plans"]
    assert [row["resolution"] for row in whole.epochs] == [12, 16, 12, 16]
    assert [row["lr"] for row in whole.epochs] == pytest.approx([0.02, 0.02, 0.004, 0.004])
    assert [row["batch_size"] for row in whole.epochs] == [25] * 4
    for row in whole.epochs:
        small = next(w for w in plans[str(row["resolution"])]["workers"] if w["small"])
        assert row["small_batch_size"] == small["batch_size"] < 25
    targets = [plans[str(resolution)]["target_seconds"] for resolution in (12, 16, 12, 16)]
    assert [row["predicted_seconds"] for row in whole.epochs] == pytest.approx(np.cumsum(targets))
    last = max(row["finished"] for row in whole.of_kind("commit"))
    assert last == whole.summary["clock_seconds"] == pytest.approx(sum(targets), rel=0.03), (
        "rounding apart"
    )
    commits = whole.of_kind("commit")
    assert [row["commits"] for row in commits] == list(range(1, 17))
    assert sorted(row["worker"] for row in commits[:4]) == [0, 1, 2, 3]
    assert whole.summary["status"] == "finished"
    assert (
        whole.summary["updates"]
        == sum(row["steps"] for row in commits)
        == whole.epochs[-1]["updates"]
    )
    assert whole.epochs[-1]["train_loss"] == pytest.approx(
        sum(row["loss"] * row["steps"] * row["batch_size"] for row in commits[12:])
        / sum(row["steps"] * row["batch_size"] for row in commits[12:])
    )


def test_the_checkpoint_holds_the_model_that_was_evaluated(whole: History) -> None:
    assert whole.run_dir is not None
    _, parts = load_parts(whole.run_dir)
    found = evaluate(parts.model, parts.test, torch.nn.CrossEntropyLoss())
    assert found.accuracy == whole.epochs[-1]["eval_accuracy"]
    assert found.loss == pytest.approx(whole.epochs[-1]["eval_loss"], rel=1e-6)
    best = checkpoints.load(whole.run_dir / "checkpoints" / "best.pt")
    accuracies = [row["eval_accuracy"] for row in whole.epochs]
    assert best["counters"]["commits"] == 4 * (accuracies.index(max(accuracies)) + 1)


class StopAfter:
    """A sink that asks the trainer to stop at a commit."""

    def __init__(self, commits: int) -> None:
        self.commits, self.trainer = commits, None

    def write(self, record: dict) -> None:  # type: ignore[type-arg]
        if record["kind"] == "commit" and record["commits"] == self.commits:
            self.trainer.request_stop()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Nothing to close."""


class Crash(StopAfter):
    """A sink that lets the process die at a commit."""

    def write(self, record: dict) -> None:  # type: ignore[type-arg]
        if record["kind"] == "commit" and record["commits"] == self.commits:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_within_the_first_epoch_and_resumed(whole: History, tmp_path: Path) -> None:
    """Nothing but the checkpoint of the beginning is there: the run begins again, and ends the
    same."""
    with pytest.raises(KeyboardInterrupt):
        build_dual_batch(
            prepare(replace(SETTINGS, run_dir=str(tmp_path / "cut"))), [Crash(2)]
        ).fit()
    resumed = build_dual_batch(on_this_machine(load_config(tmp_path / "cut"))).resume(
        tmp_path / "cut"
    )
    losses = [[row["loss"] for row in history.of_kind("commit")] for history in (whole, resumed)]
    assert losses[0] == losses[1]


SERVER_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no server": lambda s: s["dual_batch"].pop("server"),
    "weights of another number": lambda s: s["dual_batch"]["server"].update(weights=torch.ones(3)),
    "weights of another type": lambda s: s["dual_batch"]["server"].update(
        weights=torch.ones(3).to(torch.int8)
    ),
    "copies of another number": lambda s: s["dual_batch"]["running"].update(
        {0: (0.0, 1, torch.ones(3))}
    ),
    "commits that are text": lambda s: s["dual_batch"]["server"].update(commits="x"),
    "workers that are a list": lambda s: s["dual_batch"].update(workers=[]),
    "events that are numbers": lambda s: s["dual_batch"].update(events=[1]),
    "a worker without its count": lambda s: s["dual_batch"]["workers"][0].pop("next"),
    "counters of another kind": lambda s: s["counters"].update(seconds=5),
    "no counters": lambda s: s["counters"].clear(),
    "int8 model": lambda s: s["model"].update({n: v.to(torch.int8) for n, v in s["model"].items()}),
    "generators": lambda s: s["generators"].update(torch=None),
    "of another run": lambda s: s.pop("dual_batch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", SERVER_DAMAGES)
def test_a_damaged_last_checkpoint_is_passed_over(
    damage: str, whole: History, tmp_path: Path
) -> None:
    shutil.copytree(whole.run_dir, tmp_path / "run")  # type: ignore[arg-type]
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    SERVER_DAMAGES[damage](state)
    torch.save(state, path)
    resumed = build_dual_batch(on_this_machine(load_config(tmp_path / "run"))).resume(
        tmp_path / "run"
    )
    [event] = resumed.of_kind("event")
    assert event["event"] == "fallback"
    assert "continuing from previous.pt" in event["message"]
    losses = [[row["loss"] for row in history.of_kind("commit")] for history in (whole, resumed)]
    assert losses[0] == losses[1]
    assert path.with_name("last.damaged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("commits", [3, 8])
def test_interrupted_and_resumed_is_bit_equal(commits: int, whole: History, tmp_path: Path) -> None:
    """Stopped within an epoch or at its end, with momentum, dropout and workers under way."""
    config, sink = prepare(replace(SETTINGS, run_dir=str(tmp_path / "cut"))), StopAfter(commits)
    sink.trainer = build_dual_batch(config, [sink])
    stopped = sink.trainer.fit()
    assert stopped.summary["status"] == "preempted"
    assert stopped.of_kind("commit")[-1]["commits"] == commits
    assert stopped.of_kind("event")[-1]["event"] == "preempted"
    torch.manual_seed(99)
    resumed = build_dual_batch(on_this_machine(load_config(tmp_path / "cut"))).resume(
        tmp_path / "cut"
    )
    assert whole.run_dir is not None
    ends = [
        checkpoints.load(folder / "checkpoints" / "last.pt")
        for folder in (whole.run_dir, tmp_path / "cut")
    ]
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name]), name
    assert np.array_equal(*(end["dual_batch"]["server"]["weights"] for end in ends))
    timings = {"seconds", "images_per_second", "seconds_training", "seconds_evaluation"}
    rows = [
        [
            {k: v for k, v in row.items() if k not in timings}
            for row in history.records
            if row["kind"] != "event"
        ]
        for history in (whole, resumed)
    ]
    assert rows[0] == rows[1]


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    whole: History, tmp_path: Path
) -> None:
    for seed, same in ((0, True), (1, False)):
        again = trainer(tmp_path / str(seed), seed=seed, epochs=2, **CONSTANT)
        losses = [row["loss"] for row in again.fit().of_kind("commit")[:4]]
        assert (losses == [row["loss"] for row in whole.of_kind("commit")[:4]]) is same


def test_the_time_model_is_measured_once_and_kept(tmp_path: Path) -> None:
    made = {
        **plan(slope=None, intercept=None),
        **CONSTANT,
        "resolution": None,
        "dropouts": None,
        "epochs": 1,
    }
    settings = {**made, "batch_size": 32, "train_examples": 400}
    config = prepare(replace(SETTINGS, run_dir=str(tmp_path / "a"), **settings))  # type: ignore[arg-type]
    sink = StopAfter(2)
    sink.trainer = build_dual_batch(config, [sink])
    sink.trainer.fit()
    times = json.loads((tmp_path / "a" / "config.json").read_text())["dual_batch"]["times"]
    assert times.keys() == {"16"}
    assert times["16"]["slope"] > 0
    assert (times["16"]["smallest"], times["16"]["largest"]) == (4, 32)
    build_dual_batch(on_this_machine(load_config(tmp_path / "a"))).resume(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dual_batch"]["times"] == times


def one_worker(**changes: object) -> LocalTraining:
    """The first of a run at full resolution, with a model of its own."""
    settings = {
        "resolution": None,
        "dropouts": None,
        **CONSTANT,
        **plan(slope=1e-3, intercept=0.02),
        **changes,
    }
    config = prepare(replace(SETTINGS, **settings))  # type: ignore[arg-type]
    parts = build_parts(config)
    times = {16: TimeModel(1e-3, 0.02)}
    return worker_of(config, parts, plan_schedule(config, all_stages(config, parts), 400, times), 0)


def test_only_full_batches_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 examples are one batch of 250 and one of 150: three times the first of each shuffle, on a
    clock of rows."""
    worker, rows = one_worker(), [0]
    accumulate = worker._accumulate

    def counted(batch: Batch, size: int | None) -> StepResult:
        rows[0] += len(batch[1])
        return StepResult(torch.zeros(()), len(batch[1]), None, len(batch[1]))

    counted.scaler = accumulate.scaler  # type: ignore[attr-defined]
    monkeypatch.setattr(worker, "_accumulate", counted)
    monkeypatch.setattr(accumulate.scaler, "step", lambda _: None)
    monkeypatch.setattr(time, "perf_counter", lambda: float(rows[0]))
    assert worker.measure(0, 250, 3) == [250.0] * 3
    assert rows == [250 + 150 + 250 + 150 + 250], "no shuffle is gone on with when all are timed"
    with pytest.raises(
        HessianFlowError,
        match="400 examples give no batch of 399 to time: use another --batch-size",
    ):
        worker.measure(0, 399, 3)  # the one left over and those before it are halved


@pytest.mark.slow
def test_a_worker_goes_on_with_its_loss_scale() -> None:
    """An overflow at a scale of 2^100 halves it at every step; a new worker starts from torch's
    2^16."""
    worker, again = (one_worker(precision="fp16", epochs=1) for _ in range(2))
    worker._accumulate.scaler.load_state_dict(
        {**worker._accumulate.scaler.state_dict(), "scale": 2.0**100}
    )
    worker(worker._flat.read(), 0)
    scale = worker._accumulate.scaler.get_scale()
    assert 2.0**16 < scale < 2.0**100
    again.load_state_dict(with_arrays(checkable(worker.state_dict())))
    assert again._accumulate.scaler.get_scale() == scale


def test_rounds_of_equal_workers_are_plain_averaging_of_weights(tmp_path: Path) -> None:
    """Bit for bit, against a loop without server or clock: train every worker from the mean, then
    take the mean."""
    same = {
        "resolution": None,
        "dropouts": None,
        **plan(slope=1e-3, intercept=0.02, synchrony="bsp", small_workers=0, workers=2),
        **CONSTANT,
        "epochs": 2,
    }
    config = prepare(replace(SETTINGS, **same))  # type: ignore[arg-type]
    build_dual_batch(replace(config, run_dir=str(tmp_path / "run"))).fit()
    saved = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["dual_batch"]["server"][
        "weights"
    ]
    parts = build_parts(config)
    stages = all_stages(config, parts)
    schedule = plan_schedule(config, stages, parts.train.num_examples, {16: TimeModel(1e-3, 0.02)})
    workers = [worker_of(config, parts, schedule, number) for number in range(2)]
    mean = FlatWeights(parts.model).read()
    for epoch in range(2):
        made = [worker(mean, epoch) for worker in workers]
        mean = (made[0] + made[1]) / 2
    assert np.array_equal(saved.numpy(), mean)


def test_the_cap_for_growing_batches_plays_no_role() -> None:
    assert (
        resolve(TrainConfig(data="folder", controller="dual-batch", batch_size=16)).max_batch_size
        == 16
    )


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError, match="a batch of 200 is more than the 110 examples that a worker takes"
    ):
        trainer(tmp_path / "a", batch_size=200)
    with pytest.raises(
        HessianFlowError,
        match=r"--controller.slope must hold one value for each of the resolutions \[12, 16\]",
    ):
        trainer(tmp_path / "b", **plan(slope=0.1))
    with pytest.raises(HessianFlowError, match=r"layer '9' .* takes no images of 12 pixels"):
        trainer(tmp_path / "c", model="c1", dropouts=None)
    checkpoints.save(tmp_path / "d" / "checkpoints" / "last.pt", {"history_bytes": 0, "model": {}})
    with pytest.raises(HessianFlowError, match="is of a run without a parameter server"):
        trainer(tmp_path / "d").resume(tmp_path / "d")
    with pytest.raises(
        HessianFlowError,
        match=r"the training loss of worker . was not finite in epoch 1: lower the r",
    ):
        trainer(tmp_path / "e", lr=1e30).fit()
    with pytest.raises(
        HessianFlowError, match=r"f is not a run directory: it holds no config\.json"
    ):
        trainer(tmp_path / "f").resume(tmp_path / "f")


def test_a_look_at_the_data_changes_nothing() -> None:
    """Every local epoch goes to its own place, wherever somebody left the shared stream."""
    plain, looked = one_worker(), one_worker()
    start = plain._flat.read()
    for _ in looked._data:
        break
    assert np.array_equal(plain(start, 0), looked(start, 0))
