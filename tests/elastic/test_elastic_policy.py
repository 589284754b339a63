import subprocess
import sys

import pytest

from hessianflow.elastic.policy import Sample, slow_workers, workers_for


def sample(workers, batch_size, rate):
    return Sample(0.0, workers, batch_size, 0, rate)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(1, 1), (127, 1), (128, 1), (255, 1), (256, 2), (1000, 7), (1024, 8), (16384, 8)],
)
def test_each_worker_gets_a_full_microbatch(batch_size, expected):
    assert workers_for(batch_size, 128, max_workers=8) == expected


def test_bounds():
    assert workers_for(128, 128, min_workers=3, max_workers=8) == 3
    assert workers_for(16384, 128, min_workers=3, max_workers=5) == 5


def test_workers_that_do_not_pay_are_let_go():
    """Rates 100, 180, 190 at 1, 2, 4 workers: 100, 90 and 47.5 a worker; the last is below half, so
    3 at most."""
    samples = 3 * [sample(1, 512, 100.0), sample(2, 512, 180.0), sample(4, 512, 190.0)]
    assert workers_for(512, 128, samples[:8], max_workers=8) == 4, (
        "two samples at 4 workers are too few"
    )
    assert workers_for(512, 128, samples, max_workers=8) == 3
    assert workers_for(512, 128, samples, max_workers=8, min_efficiency=0.4) == 4
    assert workers_for(512, 128, samples, min_workers=4, max_workers=8) == 4


def test_another_batch_size_is_another_question():
    samples = 3 * [sample(1, 512, 100.0), sample(4, 512, 110.0)]
    assert workers_for(512, 128, samples, max_workers=8) < 4
    assert workers_for(1024, 128, samples, max_workers=8) == 8


def test_one_bad_stretch_changes_nothing():
    samples = 3 * [sample(1, 512, 100.0)]
    samples += [sample(2, 512, 180.0), sample(2, 512, 10.0), sample(2, 512, 185.0)]
    assert workers_for(512, 128, samples, max_workers=8) == 4


def test_the_answer_does_not_swing():
    """Asked again with what its own answers lead to (the rate does not grow beyond two workers), it
    settles."""
    samples, workers, answers = [], 1, []
    for _ in range(24):
        samples.append(sample(workers, 2048, 100.0 * min(workers, 2)))
        workers = workers_for(2048, 128, samples, max_workers=16)
        answers.append(workers)
    assert answers[-4:] == [answers[-1]] * 4
    assert 2 <= answers[-1] <= 4


def test_slow_workers():
    assert slow_workers([1.0, 1.1, 5.0, 0.9]) == [2]
    assert slow_workers([1.0, 1.9]) == []
    assert slow_workers([1.0, 2.1]) == [1]
    assert slow_workers([3.0]) == []


def test_bad_input():
    with pytest.raises(ValueError, match="batch_size 0"):
        workers_for(0, 128, max_workers=8)
    with pytest.raises(ValueError, match="min_workers 9, max_workers 8"):
        workers_for(128, 128, min_workers=9, max_workers=8)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from hessianflow.distributed import ray_session
try:
    ray_session.connect()
except ValueError as error:
    print(error)
"""


def test_without_ray():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, check=True
    )
    assert "pip install 'hessianflow[ray]'" in done.stdout


WRONG_ADDRESS = """
from hessianflow.distributed import ray_session
try:
    ray_session.connect("127.0.0.1:1")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_address_where_no_ray_runs():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hessianflow[ray]'")
    done = subprocess.run(
        [sys.executable, "-c", WRONG_ADDRESS], capture_output=True, text=True, check=True
    )
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stdout
