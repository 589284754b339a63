import numpy as np
import pytest

from hessianflow.dual_batch.server import ParameterServer


def server(factors, start=0.0, **options):
    return ParameterServer(np.array([start]), factors, **options)


@pytest.mark.parametrize(
    ("mixing", "expected"), [("compsac", 0.33335), ("journal", 0.6667 / 1.6667)]
)
def test_asynchronous_mixing(mixing, expected):
    """Worked by hand in the publications' notation: w_s = 0, w_w = 1, f = 0.6667 gives .33335 and
    .40001."""
    it = server({0: 0.6667}, mixing=mixing)
    receipt = it.push(0, np.array([1.0]))
    assert it.weights[0] == pytest.approx(expected, abs=1e-12)
    assert round(expected, 5) in (0.33335, 0.40001)
    assert (receipt.released, receipt.mixed, receipt.staleness, it.commits) == ((0,), True, 0, 1)


@pytest.mark.parametrize(
    ("factors", "pushed", "expected"),
    [
        (
            {0: 1.0, 1: 0.936508, 2: 0.936508, 3: 0.936508},
            {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0},
            0.262500,
        ),
        ({0: 0.809524, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, 0.212500),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, 0.25),
    ],
)
def test_synchronous_mixing(factors, pushed, expected):
    """k = 1.05, n = 4: three, one and no small workers; the mean waits for the last push."""
    it = server(factors, start=9.0, synchrony="bsp")
    receipts = [it.push(worker, np.array([value])) for worker, value in pushed.items()]
    assert [r.released for r in receipts] == [(), (), (), (0, 1, 2, 3)]
    assert it.weights[0] == pytest.approx(expected, abs=5e-7)


def test_synchronous_with_full_shares_is_plain_averaging():
    source = np.random.default_rng(0)
    pushed = source.normal(size=(4, 1000)).astype(np.float32)
    it = ParameterServer(np.zeros(1000, np.float32), dict.fromkeys(range(4), 1.0), synchrony="bsp")
    for worker in (2, 0, 3, 1):  # the order of arrival must not show
        it.push(worker, pushed[worker])
    assert it.weights.dtype == np.float32
    assert np.array_equal(
        it.weights, (pushed[0] + pushed[1] + pushed[2] + pushed[3]) / np.float32(4)
    )


def test_bounded_staleness():
    """Bound 1, factor 1, journal mixing (halfway): worker 0's second push would be 2 ahead, so it
    opens a round."""
    it = server({0: 1.0, 1: 1.0}, synchrony="ssp", staleness=1)
    assert it.push(0, np.array([8.0])).released == (0,)
    assert it.weights[0] == 4.0
    opened = it.push(0, np.array([6.0]))
    assert (opened.released, opened.mixed, it.weights[0], it.waiting) == ((), False, 4.0, (0,))
    with pytest.raises(ValueError, match="worker 0 has pushed into this round"):
        it.push(0, np.array([6.0]))
    closed = it.push(1, np.array([2.0]))
    assert (closed.released, it.weights[0]) == ((0, 1), 4.0)  # (6 + 2) / 2, not halfway again
    assert it.push(0, np.array([0.0])).released == (0,), "the counters start again"
    assert it.weights[0] == 2.0


def test_staleness_counts_the_commits_of_others():
    it = server({0: 1.0, 1: 1.0})
    it.pull(0)
    it.pull(1)
    for _ in range(3):
        it.push(1, it.pull(1))
    assert it.push(0, np.array([0.0])).staleness == 3


def test_a_dead_worker_holds_nobody_up():
    it = server({0: 1.0, 1: 1.0, 2: 1.0}, synchrony="bsp")
    it.push(0, np.array([3.0]))
    it.push(2, np.array([5.0]))
    assert it.remove(1) == (0, 2)
    assert it.weights[0] == 4.0
    it.add(1, 0.5)
    assert it.workers == (0, 1, 2)
    assert it.push(0, np.array([0.0])).released == ()


def test_what_a_dead_worker_pushed_stays():
    it = server({0: 1.0, 1: 1.0}, synchrony="bsp")
    it.push(0, np.array([3.0]))
    assert it.remove(0) == ()
    assert it.push(1, np.array([5.0])).released == (1,)
    assert it.weights[0] == 4.0


def test_a_newcomer_is_not_behind():
    it = server({0: 1.0, 1: 1.0}, synchrony="ssp", staleness=2)
    for worker in (0, 1, 0, 1):
        it.push(worker, np.array([1.0]))
    it.add(2, 1.0)
    assert it.push(0, np.array([1.0])).mixed
    assert it.push(0, np.array([1.0])).mixed
    assert not it.push(0, np.array([1.0])).mixed


def test_pulled_weights_are_a_copy():
    it = server({0: 1.0})
    it.pull(0)[0] = 7.0
    assert it.weights[0] == 0.0


@pytest.mark.parametrize("synchrony", ["asp", "bsp", "ssp"])
def test_a_restored_server_goes_on(synchrony):
    """Stopped in the middle (of a round, where there is one), the restored server gives what the
    first one gives."""
    source = np.random.default_rng(1)
    pushes = [(0, source.normal(size=3)), (0, source.normal(size=3)), (1, source.normal(size=3))]
    if synchrony == "bsp":
        pushes = [pushes[0], pushes[2]]
    first = ParameterServer(np.zeros(3), {0: 1.0, 1: 0.5}, synchrony=synchrony, staleness=1)
    for worker, weights in pushes[:-1]:
        first.push(worker, weights)
    second = ParameterServer(np.zeros(3), {0: 1.0}, synchrony=synchrony, staleness=1)
    second.load_state_dict(first.state_dict())
    assert [it.push(*pushes[-1]) for it in (first,)] == [it.push(*pushes[-1]) for it in (second,)]
    assert np.array_equal(first.weights, second.weights)
    assert first.commits == second.commits == len(pushes)


def test_bad_input():
    with pytest.raises(ValueError, match="synchrony must be one of asp, bsp, ssp, got 'both'"):
        server({0: 1.0}, synchrony="both")
    with pytest.raises(ValueError, match="mixing must be one of compsac, journal, got 'mean'"):
        server({0: 1.0}, mixing="mean")
    with pytest.raises(ValueError, match="staleness must be at least 0, got -1"):
        server({0: 1.0}, staleness=-1)
    with pytest.raises(ValueError, match="at least one worker"):
        server({})
    with pytest.raises(ValueError, match="factor of worker 3 must be positive, got 0"):
        server({3: 0.0})
    it = server({0: 1.0})
    with pytest.raises(ValueError, match="worker 0 takes part already"):
        it.add(0, 1.0)
    with pytest.raises(ValueError, match=r"worker 5 does not take part; those that do: \[0\]"):
        it.pull(5)
    with pytest.raises(ValueError, match=r"shape \[1\], got \[2\] from worker 0"):
        it.push(0, np.zeros(2))
    with pytest.raises(ValueError, match="it is of another model"):
        it.load_state_dict({"weights": np.zeros(2)})
