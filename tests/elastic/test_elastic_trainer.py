"""The trainer as an elastic job: whatever becomes of the world, weights and records are those of
one process."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import LOCAL
from test_elastic import STEPWISE, changes, settle
from trainers import EPOCHS, build, growing, pixels, plain, untimed, weights

from hessianflow import HessianFlowError, History
from hessianflow.adversarial import FGSM, ConcurrentAdversary
from hessianflow.cli import main
from hessianflow.commands import training
from hessianflow.config import TrainConfig
from hessianflow.control import FixedBatch
from hessianflow.distributed import run_simulated
from hessianflow.distributed.state import pack, unpack
from hessianflow.elastic import ElasticSettings, ElasticTrainer, TrainerJob, build_elastic
from hessianflow.optim import GradientMoments, MicrobatchNorms
from hessianflow.resolve import resolve
from hessianflow.training import Passes

RAY_LEAVES_SOCKETS = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def alone(options=plain) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    trainer = build(None, options)
    history = trainer.fit()
    return weights(trainer.model), untimed(history.records)


def job(options=plain) -> TrainerJob:
    return TrainerJob(partial(build, options=options))


def finish(made: TrainerJob) -> None:
    for _ in range(20):  # more than there are epochs
        made.run_until(10**6)


def check(made: TrainerJob, options=plain) -> None:
    expected, rows = alone(options)
    assert torch.allclose(weights(made._trainer.model), expected, rtol=0, atol=1e-10)
    assert made.report().done
    for row, wanted in zip(untimed(made.rows(0)), rows, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            close = isinstance(value, float)  # losses are summed in float32
            assert row[name] == (pytest.approx(value, rel=1e-6) if close else value), name


@pytest.mark.parametrize("options", [plain, growing])
def test_one_worker_two_and_one_again(options):
    """Batches of 16 with tails of 11, growing to 64 with an eigenvalue in every epoch: as in one
    process."""
    first, second = job(options), job(options)
    first.join(LOCAL)
    first.run_until(3)
    second.load_state(unpack(*pack(first.state())))  # as it travels: no tensor is shared

    def both(reducer) -> None:
        mine = (first, second)[reducer.rank]
        mine.join(reducer)
        mine.run_until(8)  # to the end of the epoch
        mine.run_until(8)

    run_simulated(both, 2)
    assert second.rows(0)
    assert untimed(second.rows(0)) == untimed(first.rows(0))
    second.join(LOCAL)
    finish(second)
    check(second, options)


def breaking(model, world):
    """The third update fails on this rank."""

    def transform(inputs, targets, progress):
        if progress.updates == 2:
            raise RuntimeError("device-side assert")
        return inputs, targets

    return {"transform": transform}


def test_an_interrupted_update_is_made_again():
    """Another rank fails in the third update; the batch under way is trained again and counted
    once."""
    first, second = job(), job(breaking)

    def both(reducer) -> None:
        mine = (first, second)[reducer.rank]
        mine.join(reducer)
        mine.run_until(20)

    with pytest.raises(RuntimeError, match="device-side assert"):
        run_simulated(both, 2)
    assert first.report().updates in (1, 2), (
        "the end of the second update may not have reached this rank"
    )
    first.join(LOCAL)
    finish(first)
    check(first)


def test_microbatches_of_an_interrupted_update_are_observed_once():
    """The loss fails in the fifth update, the last of the epoch, after one microbatch of 3
    examples."""
    calls, figures = [], []

    def loss(outputs, targets):
        if outputs.requires_grad:  # not where it is asked whether it may be cut
            calls.append(len(targets))
            if len(calls) == fails_at:
                raise RuntimeError("device-side assert")
        return F.cross_entropy(outputs, targets)

    for fails_at in (0, 4 * 6 + 2):  # 16 examples are 6 microbatches
        calls.clear()
        seen: list[Any] = []

        def observed(model, world, seen=seen):
            seen += [GradientMoments(), MicrobatchNorms(model.parameters())]
            return {"observers": seen, "passes": Passes(microbatch_size=3), "loss_fn": loss}

        made = job(observed)
        made.join(LOCAL)
        if fails_at:
            with pytest.raises(RuntimeError, match="device-side assert"):
                made.run_until(5)
            made.join(LOCAL)
        assert made.run_until(5).updates == 5
        figures.append((seen[0].signals(), seen[1].mean_norms(seen[1].params)))
    assert figures[0][0] == pytest.approx(figures[1][0], rel=1e-10)
    torch.testing.assert_close(figures[0][1], figures[1][1], rtol=1e-10, atol=0)


def test_batches_drawn_ahead_are_refused():
    """Another world would draw them anew."""
    adversary = ConcurrentAdversary(FGSM(0.1, value_range=None), staleness=1)
    with pytest.raises(HessianFlowError, match="staleness must be 0 in an elastic run"):
        job(lambda *_: {"adversary": adversary, "controller": FixedBatch(16)})


def test_stretches_end_with_epochs():
    """75 examples in batches of 16: 5 updates an epoch; the end of an epoch is a good moment for a
    snapshot."""
    made = job()
    made.join(LOCAL)
    reports = [made.run_until(100) for _ in range(EPOCHS)]
    assert [report.updates for report in reports] == [5, 10, 15, 20]
    assert all(report.keep for report in reports)
    assert [report.done for report in reports] == [False, False, False, True]
    assert [row["kind"] for row in made.rows(2)] == ["epoch", "epoch"]
    # 37 + 37 + 1
    lonely = TrainerJob(partial(build, options=lambda *_: {"train_data": pixels(37)}))
    lonely.join(LOCAL)
    assert lonely.run_until(100).updates == 2, "one example joins the batch before it"


def test_an_elastic_run_counts_whole_passes():
    with pytest.raises(HessianFlowError, match="an elastic run counts whole passes over the data"):
        job(lambda *_: {"max_updates": 3})


class Mortal:
    """Kills its process at chosen updates, once each: a transform, since that sees every batch."""

    def __init__(self, folder: str, *updates: int) -> None:
        self.folder, self.updates = folder, updates

    def __call__(self, inputs, targets, progress):
        if progress.updates in self.updates:
            try:
                Path(self.folder, f"killed-{progress.updates}").touch(exist_ok=False)
            except FileExistsError:
                return inputs, targets
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs, targets


def mortal(folder: str, *updates: int):
    return lambda model, world: {**growing(model, world), "transform": Mortal(folder, *updates)}


@pytest.mark.slow
@RAY_LEAVES_SOCKETS
def test_workers_that_are_killed_change_no_number(ray, tmp_path):
    """Killed at updates 6 and 12, of two workers each time; then stopped, and resumed from the last
    checkpoint."""

    def policy(report, samples):
        settle(ray, trainer._run)
        if report.updates >= 14:
            trainer.request_stop()
        return 2

    settings = ElasticSettings(2, 2, snapshot_seconds=1e9, **STEPWISE)
    make = partial(build, options=mortal(str(tmp_path), 6, 12))
    trainer = ElasticTrainer(make, settings, run_dir=tmp_path / "run", policy=policy)
    history = trainer.fit()
    assert history.summary["status"] == "preempted"
    assert history.summary["workers_lost"] >= 2
    assert history.summary["world_size"] == 2
    assert {"died", "restored", "requested", "joined", "stopped"} <= set(changes(trainer._run))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["epochs"] > 1
    (tmp_path / "run" / "summary.json").unlink()

    again = ElasticTrainer(
        partial(build, options=growing), ElasticSettings(**STEPWISE), run_dir=tmp_path / "run"
    )
    history = again.resume(tmp_path / "run")
    assert history.summary["status"] == "finished"
    expected, rows = alone(growing)
    assert history.summary["examples"] == rows[-1]["examples"]
    found = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert torch.allclose(
        torch.cat([value.reshape(-1) for value in found.values()]), expected, rtol=0, atol=1e-10
    )
    mine = [
        row
        for row in History.load(tmp_path / "run").records
        if row["kind"] not in ("event", "throughput")
    ]
    assert [(row["kind"], row["examples"]) for row in mine] == [
        (row["kind"], row["examples"]) for row in rows
    ]
    assert (tmp_path / "run" / "checkpoints" / "best.pt").exists()


@pytest.mark.slow
@RAY_LEAVES_SOCKETS
def test_the_command_trains_and_resumes(ray, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [
        "--elastic",
        "--min-workers",
        "1",
        "--max-workers",
        "2",
        "--epochs",
        "2",
        "--run-dir",
        "run",
    ]
    assert main(["train", *options]) == 0
    out = capsys.readouterr().out
    assert "finished: test accuracy" in out
    assert "run/plots/workers.png" in out
    history = History.load("run")
    assert history.config["settings"]["elastic"]
    assert history.summary["examples"] == 2 * 1438
    assert [row["event"] for row in history.of_kind("event")][-1] == "finished"
    assert main(["resume", "run"]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--elastic", "--min-workers", "3", "--max-workers", "2"],
            "--max-workers 2 is below --min-workers 3: raise it",
        ),
        (["--elastic", "--min-workers", "0"], "--min-workers must be at least 1, got 0"),
        (["--min-workers", "2"], "--min-workers is a setting of --elastic runs: add --elastic"),
        (["--elastic", "--adversary", "conadv"], "--elastic does not go with --adversary conadv"),
        (
            ["--elastic", "--on-divergence", "rollback"],
            "--elastic does not go with --on-divergence rollback",
        ),
    ],
)
def test_settings_that_contradict_each_other(arguments, words, capsys):
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@RAY_LEAVES_SOCKETS
def test_more_workers_than_there_is_room_for(ray, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--elastic", "--min-workers", "4", "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert (
        "4 workers of 1 CPUs need more than the 3 CPUs of this machine: lower --min-workers" in err
    )
    assert not Path("run").exists()


def test_no_ray_at_the_address_and_no_ray_at_all(tmp_path, monkeypatch, capsys):
    """Before anything is connected: port 1 of this machine serves nothing."""
    import sys

    monkeypatch.chdir(tmp_path)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)
    assert main(["train", "--elastic", "--ray-address", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["train", "--elastic"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'hessianflow[ray]'" in err
    assert err.count("\n") == 1


def test_what_is_refused_before_ray_is_asked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trainer = ElasticTrainer(build, ElasticSettings(), run_dir=tmp_path)
    with pytest.raises(ValueError, match="is not empty: name a new or an empty one"):
        trainer.fit()
    with pytest.raises(ValueError, match="an elastic run needs --run-dir"):
        build_elastic(resolve(TrainConfig(elastic=True)))
    config = resolve(TrainConfig(elastic=True, run_dir="run"))
    with pytest.raises(ValueError, match="start it without torchrun"):
        training._trainer(config, SimpleNamespace(world_size=2))
