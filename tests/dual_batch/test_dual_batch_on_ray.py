"""Whole dual-batch runs on Ray: in real processes, with a worker and a server that are killed on
the way."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hessianflow.config import TrainConfig
from hessianflow.dual_batch import build_dual_batch
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.parts import load_config, on_this_machine, prepare
from hessianflow.runs import checkpoints

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

SETTINGS = TrainConfig(
    data="digits",
    model="resnet8",
    controller={
        "name": "dual-batch",
        "workers": 2,
        "small_workers": 1,
        "extra_time": 1.1,
        "slope": 1e-3,
        "intercept": 1e-2,
        "server": "ray",
    },
    batch_size=64,
    epochs=4,
    schedule={"name": "multistep", "milestones": ()},
    device="cpu",
    threads=1,
)


def die_once(flag: str) -> None:
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def mortal_worker(make_worker, flag: str, number: int):
    """Worker 1 dies in its second local epoch, once."""
    worker, begun = make_worker(number), []

    class Mortal:
        figures = property(lambda self: worker.figures)

        def __call__(self, weights, epoch):
            begun.append(epoch)
            if number == 1 and len(begun) == 2:
                die_once(flag)
            return worker(weights, epoch)

    return Mortal()


class MortalServer(ParameterServer):
    """Dies at its sixth push, once."""

    def push(self, worker, weights):
        if self.commits == 5:
            die_once(self.flag)
        return super().push(worker, weights)


def mortal_server(make_server, flag: str) -> MortalServer:
    made = make_server()
    server = MortalServer(made.weights, made.factors, made.synchrony)
    server.flag = flag
    return server


class StopAt:
    """A sink that asks the trainer to stop at a commit."""

    trainer = None

    def __init__(self, commits: int) -> None:
        self.commits = commits

    def write(self, record: dict) -> None:
        if record["kind"] == "commit" and record["commits"] == self.commits:
            self.trainer.request_stop()

    def close(self) -> None:
        """Nothing to close."""


def commits_of(history) -> list[int]:
    return list({row["commits"]: row for row in history.of_kind("commit")})


@pytest.mark.slow
def test_a_run_survives_the_death_of_a_worker_and_of_the_server(ray, tmp_path: Path) -> None:
    config = prepare(replace(SETTINGS, run_dir=str(tmp_path / "run")))
    trainer, sound = build_dual_batch(config), build_dual_batch(config)._transport
    trainer._transport = replace(
        sound,
        make_worker=partial(mortal_worker, sound.make_worker, str(tmp_path / "worker")),
        make_server=partial(mortal_server, sound.make_server, str(tmp_path / "server")),
    )
    history = trainer.fit()
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]
    assert commits_of(history) == list(range(1, 9))
    events = [row["message"] for row in history.of_kind("event")]
    assert any("worker 1 died" in event for event in events)
    assert any("server died after 5 commits; back to 4" in event for event in events)
    last = {row["commits"]: row for row in history.of_kind("commit")}.values()
    assert history.summary["updates"] == sum(row["steps"] for row in last), (
        "what was made again counts once"
    )
    assert history.summary["predicted_seconds"] == pytest.approx(
        4 * 1.1 * (1e-3 + 1e-2 / 64) * 1438 / 2
    )


@pytest.mark.slow
def test_stopped_on_ray_and_resumed_there(ray, tmp_path: Path) -> None:
    config = prepare(replace(SETTINGS, epochs=2, run_dir=str(tmp_path / "run")))
    sink = StopAt(3)
    sink.trainer = build_dual_batch(config, [sink])
    stopped = sink.trainer.fit()
    assert stopped.summary["status"] == "preempted"
    assert (
        checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["dual_batch"]["server"][
            "commits"
        ]
        == 3
    )
    resumed = build_dual_batch(on_this_machine(load_config(tmp_path / "run"))).resume(
        tmp_path / "run"
    )
    assert resumed.summary["status"] == "finished"
    assert commits_of(resumed) == [1, 2, 3, 4]
    finished = [row["finished"] for row in resumed.of_kind("commit")]
    assert finished == sorted(finished), "the clock goes on from where it stopped"
    assert all(row["train_loss"] > 0 for row in resumed.epochs)
