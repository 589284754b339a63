import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hessianflow.dual_batch.ray_server import train_on_ray
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.simulated_server import simulate
from hessianflow.interfaces import HessianFlowError

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
COMMITS = 12


class MortalServer(ParameterServer):
    """Dies at its tenth push, once."""

    folder = ""

    def push(self, worker, weights):
        if self.commits == 9 and self.folder and is_first(self.folder, "server"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().push(worker, weights)


def is_first(folder, mark):
    """Whether no process has left this mark before."""
    try:
        Path(folder, mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make_server(folder):
    server = MortalServer(np.zeros(4), {0: 1.0, 1: 0.5}, synchrony="bsp")
    server.folder = folder
    return server


def make_worker(number):
    target = (1.0, -1.0)[number]
    return lambda weights, epoch: weights + (target - weights) / (2 + epoch)


def failing_worker(folder, number):
    """Worker 1 kills its process in its second epoch, once; worker 0 hangs in its third, once."""

    def local_epoch(weights, epoch):
        if (number, epoch) == (1, 1) and is_first(folder, "worker 1"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (number, epoch) == (0, 2) and is_first(folder, "worker 0"):
            time.sleep(3600)
        return weights + 1

    return local_epoch


@pytest.mark.slow
def test_workers_that_die_or_hang_cost_no_commit(ray, tmp_path):
    """In rounds, where everybody waits for the one that is missing."""
    Path(tmp_path, "server").touch()  # which is to live
    make = partial(make_server, str(tmp_path))
    run = train_on_ray(
        make, partial(failing_worker, str(tmp_path)), commits=COMMITS, timeout_seconds=8
    )
    assert len(run.timeline) == COMMITS
    assert any("worker 1 died" in event for event in run.events)
    assert any("worker 0 hung" in event for event in run.events)


@pytest.mark.slow
def test_a_server_that_dies_goes_on_from_its_snapshot(ray, tmp_path):
    """Rounds make the order of arrival irrelevant: real processes give the simulated numbers bit
    for bit.

    The run goes on from a simulated server's state after 4 commits, and from its own snapshot at 8
    when it dies at 9.
    """
    folder, snapshots, seen = str(tmp_path), [], []
    workers, seconds = {n: make_worker(n) for n in (0, 1)}, lambda worker, epoch: 1.0 + worker
    half, whole = make_server(""), make_server("")
    simulate(half, workers, seconds, commits=4)
    simulate(whole, workers, seconds, commits=8)
    simulate(whole, workers, seconds, commits=COMMITS)
    run = train_on_ray(
        partial(make_server, folder),
        make_worker,
        commits=COMMITS,
        snapshot_commits=4,
        resume_from=half.state_dict(),
        on_snapshot=snapshots.append,
        on_commit=seen.append,
    )
    assert np.array_equal(run.weights, whole.weights)
    assert len(run.events) == 1
    assert "server died after 9 commits" in run.events[0]
    assert [snapshot["commits"] for snapshot in snapshots] == [8, 12]
    assert len(seen) == 9, "the ninth was made twice"
    assert sorted(c.epoch for c in run.timeline) == [2, 2, 3, 3, 4, 4, 5, 5]
    assert all(c.released >= c.finished > c.started for c in run.timeline)


def starting_badly(folder):
    """The server's process is killed while it builds the server, once."""
    if is_first(folder, "building"):
        os.kill(os.getpid(), signal.SIGKILL)
    return MortalServer(np.zeros(4), {0: 1.0, 1: 0.5}, synchrony="bsp")


class DiesAtTheEnd(ParameterServer):
    """Dies when its actor is asked for the weights, once: all that is left is the last snapshot."""

    folder = ""

    def __getattribute__(self, name):
        if (
            name == "weights"
            and sys._getframe(1).f_code.co_name == "weights"
            and is_first(self.folder, "end")
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def ending_badly(folder):
    server = DiesAtTheEnd(np.zeros(4), {0: 1.0, 1: 0.5}, synchrony="bsp")
    server.folder = folder
    return server


@pytest.mark.slow
@pytest.mark.parametrize("make", [starting_badly, ending_badly])
def test_a_server_that_dies_at_the_start_or_at_the_end_is_replaced(ray, tmp_path, make):
    """Rounds make the order of arrival irrelevant: real processes give the simulated numbers bit
    for bit."""
    whole = make_server("")
    simulate(
        whole,
        {n: make_worker(n) for n in (0, 1)},
        lambda worker, epoch: 1.0 + worker,
        commits=COMMITS,
    )
    run = train_on_ray(
        partial(make, str(tmp_path)), make_worker, commits=COMMITS, snapshot_commits=5
    )
    assert np.array_equal(run.weights, whole.weights)
    assert len(run.timeline) == COMMITS
    words = (
        "died while it started" if make is starting_badly else "died after 12 commits; back to 10"
    )
    assert [words in event for event in run.events] == [True]


def refusing(number):
    raise HessianFlowError("no data under x: get it")


def lonely():
    return ParameterServer(np.zeros(4), {0: 1.0}, synchrony="asp")


def always_dying(number):
    def local_epoch(weights, epoch):
        os.kill(os.getpid(), signal.SIGKILL)

    return local_epoch


def broken(number):
    def local_epoch(weights, epoch):
        raise KeyError("a bug of the user's")

    return local_epoch


@pytest.mark.slow
def test_what_cannot_go_on_says_so(ray):
    with pytest.raises(ValueError, match=r"too many failures, the last: worker 0 died"):
        train_on_ray(lonely, always_dying, commits=4, max_restarts=0)
    with pytest.raises(Exception, match="a bug of the user's"):
        train_on_ray(lonely, broken, commits=4)
    for make_server, make_worker in ((lonely, refusing), (partial(refusing, 0), broken)):
        with pytest.raises(HessianFlowError, match=r"^no data under x: get it$"):
            train_on_ray(make_server, make_worker, commits=4)
