import os
import signal
import time
from functools import partial

import numpy as np
import pytest

from hessianflow.distributed import ray_server
from hessianflow.distributed.parameter_server import ParameterServer
from hessianflow.distributed.ray_server import train_on_ray
from hessianflow.distributed.simulated_server import simulate

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def make_server(synchrony):
    return ParameterServer(np.zeros(4), {0: 1.0, 1: 0.5}, synchrony=synchrony)


def make_worker(number):
    target = (1.0, -1.0)[number]
    return lambda weights, epoch: weights + (target - weights) / (2 + epoch)


def test_synchronous_training_equals_the_simulation(ray):
    """Rounds make the order of arrival irrelevant, so that real processes give the simulated numbers bit for bit."""
    server = make_server("bsp")
    simulate(server, {n: make_worker(n) for n in (0, 1)}, lambda w, e: 1.0 + w, commits=8)
    seen = []
    run = train_on_ray(partial(make_server, "bsp"), make_worker, commits=8, on_commit=seen.append)
    assert np.array_equal(run.weights, server.weights)
    assert len(run.timeline) == len(seen) == 8
    assert sorted(c.epoch for c in run.timeline) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(c.released >= c.finished > c.started for c in run.timeline)
    assert run.events == []


def failing_worker(folder, number):
    """Worker 1 kills its process in its second epoch, once; worker 0 hangs in its third, once."""

    def local_epoch(weights, epoch):
        flag = os.path.join(folder, str(number))
        done = len(os.listdir(folder))
        with open(os.path.join(folder, f"{number}-{time.time_ns()}"), "w"):
            pass
        if number == 1 and done > 3 and not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0 and done > 6 and not os.path.exists(flag):
            open(flag, "w").close()
            time.sleep(600)
        time.sleep(0.1)
        return weights + 1

    return local_epoch


def test_workers_that_die_or_hang_cost_no_commit(ray, tmp_path, monkeypatch):
    """In rounds, where everybody waits for the one that is missing."""
    monkeypatch.setattr(ray_server, "START_SECONDS", 20.0)
    run = train_on_ray(
        partial(make_server, "bsp"), partial(failing_worker, str(tmp_path)), commits=12, timeout_seconds=2
    )
    assert len(run.timeline) == 12
    assert len(run.events) == 2
    assert any("worker 1 died" in event for event in run.events)
    assert any("worker 0 hung" in event for event in run.events)


class MortalServer(ParameterServer):
    """Dies at its sixth push, once."""

    def push(self, worker, weights):
        if self.commits == 5 and not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().push(worker, weights)


def make_mortal(flag):
    server = MortalServer(np.zeros(4), {0: 1.0, 1: 1.0}, synchrony="bsp")
    server.flag = flag
    return server


def test_a_server_that_dies_goes_on_from_its_snapshot(ray, tmp_path):
    snapshots = []
    flag = str(tmp_path / "died")
    run = train_on_ray(
        partial(make_mortal, flag), make_worker, commits=8, snapshot_commits=4, on_snapshot=snapshots.append
    )
    assert len(run.timeline) == 8
    assert any("server died after 5 commits" in event for event in run.events)
    alive = make_mortal(flag)
    simulate(alive, {n: make_worker(n) for n in (0, 1)}, lambda w, e: 1.0, commits=8)
    assert np.array_equal(run.weights, alive.weights)
    assert [snapshot["commits"] for snapshot in snapshots] == [4, 8]
    resumed = train_on_ray(partial(make_mortal, flag), make_worker, commits=8, resume_from=snapshots[0])
    assert np.array_equal(resumed.weights, alive.weights)
    assert len(resumed.timeline) == 4


def always_dying(number):
    def local_epoch(weights, epoch):
        os.kill(os.getpid(), signal.SIGKILL)

    return local_epoch


def broken(number):
    def local_epoch(weights, epoch):
        raise KeyError("a bug of the user's")

    return local_epoch


def test_what_cannot_go_on_says_so(ray):
    with pytest.raises(ValueError, match=r"too many failures, the last: worker [01] died"):
        train_on_ray(partial(make_server, "asp"), always_dying, commits=4, max_restarts=0)
    with pytest.raises(Exception, match="a bug of the user's"):
        train_on_ray(partial(make_server, "asp"), broken, commits=4)
