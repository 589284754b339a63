import math

import numpy as np
import pytest

from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.simulated_server import simulate


def pull_towards(target):
    """A local epoch: gradient descent on (w - target)^2 / 2, the step shrinking with the epoch."""
    return lambda weights, epoch: weights + (target - weights) / (2 + epoch)


def two(synchrony, **options):
    server = ParameterServer(np.zeros(2), {0: 1.0, 1: 1.0}, synchrony=synchrony, **options)
    return server, {0: pull_towards(1.0), 1: pull_towards(-1.0)}


def test_the_clock_alone_decides_the_order():
    """Epochs of 2 s and 5 s: pushes at 2 4 (5) 6 8 10 10; worker 0 first where times are equal."""
    server, workers = two("asp")
    timeline = simulate(server, workers, lambda worker, epoch: (2.0, 5.0)[worker], commits=7)
    assert [(c.worker, c.finished) for c in timeline] == [
        (0, 2),
        (0, 4),
        (1, 5),
        (0, 6),
        (0, 8),
        (0, 10),
        (1, 10),
    ]
    assert [c.staleness for c in timeline] == [0, 0, 2, 1, 0, 0, 3]
    assert [c.epoch for c in timeline] == [0, 1, 0, 1, 2, 3, 2], (
        "(commits + under way) // workers when it pulled"
    )
    assert all(c.released == c.finished for c in timeline)


def test_the_same_run_twice():
    runs = []
    for _ in range(2):
        server, workers = two("ssp", staleness=1)
        timeline = simulate(server, workers, lambda worker, epoch: 1.0 + worker * 0.7, commits=9)
        runs.append((server.weights.tolist(), [(c.worker, c.finished) for c in timeline]))
    assert runs[0] == runs[1]


def test_synchronous_workers_wait_for_the_slowest():
    server, workers = two("bsp")
    timeline = simulate(server, workers, lambda worker, epoch: (2.0, 5.0)[worker], commits=4)
    assert [(c.worker, c.started, c.finished, c.released) for c in timeline] == [
        (0, 0, 2, 5),
        (1, 0, 5, 5),
        (0, 5, 7, 10),
        (1, 5, 10, 10),
    ]


def test_synchronous_with_full_shares_is_plain_weight_averaging():
    """Bit for bit, against a loop that knows neither server nor clock."""
    source = np.random.default_rng(3)
    targets = source.normal(size=(3, 50))
    server = ParameterServer(np.zeros(50), dict.fromkeys(range(3), 1.0), synchrony="bsp")
    simulate(
        server, {i: pull_towards(targets[i]) for i in range(3)}, lambda w, e: 3.0 - w, commits=12
    )
    weights = np.zeros(50)
    for epoch in range(4):
        made = [weights + (target - weights) / (2 + epoch) for target in targets]
        weights = (made[0] + made[1] + made[2]) / 3
    assert np.array_equal(server.weights, weights)


def test_a_waiting_worker_has_no_release_time():
    server, workers = two("bsp")
    (only,) = simulate(server, workers, lambda worker, epoch: 1.0 + worker, commits=1)
    assert math.isnan(only.released)


def test_every_push_is_reported():
    server, workers = two("asp")
    seen = []
    timeline = simulate(server, workers, lambda w, e: 1.0, commits=4, on_commit=seen.append)
    assert [c.worker for c in seen] == [c.worker for c in timeline] == [0, 1, 0, 1]


def test_workers_that_keep_pace_train_every_epoch_once():
    server, workers = two("asp")
    timeline = simulate(server, workers, lambda w, e: 1.0 + 0.001 * w, commits=8)
    assert sorted((c.worker, c.epoch) for c in timeline) == [
        (w, e) for w in (0, 1) for e in range(4)
    ]


class Counting:
    """A local epoch with a memory and figures: adds its count."""

    def __init__(self):
        self.count, self.figures = 0, {}

    def __call__(self, weights, epoch):
        self.count += 1
        self.figures = {"count": self.count}
        return weights + self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("synchrony", ["asp", "bsp", "ssp"])
def test_stopped_and_resumed_is_bit_equal(synchrony):
    def start():
        return ParameterServer(np.zeros(3), {0: 1.0, 1: 0.7}, synchrony), {
            0: Counting(),
            1: Counting(),
        }

    def seconds(worker, epoch):
        return 1.0 + 0.6 * worker

    server, workers = start()
    whole = simulate(server, workers, seconds, commits=10)
    cut, snapshots = start(), []
    stops = iter([False] * 4 + [True])
    options = {"snapshot_commits": 4, "on_snapshot": snapshots.append}
    first = simulate(*cut, seconds, commits=10, should_stop=lambda: next(stops), **options)
    assert [s["server"]["commits"] for s in snapshots] == [4, 5], (
        "after four commits, and when stopped"
    )
    again, others = start()
    rest = simulate(again, others, seconds, commits=10, resume_from=snapshots[-1])
    assert np.array_equal(again.weights, server.weights)
    key = [(c.worker, c.finished, c.epoch, c.figures["count"]) for c in first + rest]
    assert key == [(c.worker, c.finished, c.epoch, c.figures["count"]) for c in whole]


def test_bad_input():
    server, workers = two("asp")
    with pytest.raises(
        ValueError, match=r"workers must be those of the server, \[0, 1\], got \[0\]"
    ):
        simulate(server, {0: workers[0]}, lambda w, e: 1.0, commits=1)
    with pytest.raises(ValueError, match=r"positive time, got 0\.0 s for worker 0"):
        simulate(server, workers, lambda w, e: 0.0, commits=1)
