import pytest
import torch
from ranks import train, train_alone
from test_distributed_curvature import dense_eigenvalues, measure
from test_process_group import agree
from test_synchronize import check_equal, unequal

from hessianflow.distributed.launch import run_local, run_simulated


@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_any_world_equals_one_process(world_size):
    """20 ranks share batches of 16 and 11: some have no example in every step."""
    results = run_simulated(train, world_size, 20)
    check_equal(results[0], train_alone(20))
    assert all(torch.equal(results[0]["weights"], other["weights"]) for other in results[1:])


def test_two_simulated_ranks_are_bitwise_those_of_gloo():
    simulated, real = run_simulated(train, 2, 8), run_local(train, 2, 8)
    assert torch.equal(simulated[0]["weights"], real[0]["weights"])
    assert simulated[0]["losses"] == real[0]["losses"]


def test_simulated_ranks_agree():
    for total, word, everyone, tensor, flat in run_simulated(agree, 2):
        assert torch.equal(total, torch.full((3, 2), 3.0))
        assert (word, everyone) == ({"rank": 0}, [0, 10])
        assert (tensor.tolist(), flat.tolist()) == ([7, 7], [2.0, 4.0])
    assert [result[0].examples for result in run_simulated(unequal, 2)] == [3, 3]


def test_simulated_curvature():
    for values, *_ in run_simulated(measure, 3):
        assert values.numpy() == pytest.approx(dense_eigenvalues(), abs=1e-8)


def cancel(reducer):
    """2^40 + 1 - 2^40: summed in float32 the answer would be 0."""
    value = [2.0**40, 1.0, -(2.0**40)][reducer.rank]
    return reducer.sum(torch.tensor([value])).item()


def test_sums_are_exact():
    assert run_simulated(cancel, 3) == [1.0] * 3


def fail(reducer):
    if reducer.rank == 2:
        raise KeyError("rank two")
    reducer.sum(torch.ones(1))


def test_a_failing_rank_is_the_one_reported():
    with pytest.raises(KeyError, match="rank two"):
        run_simulated(fail, 3)
    with pytest.raises(ValueError, match="world_size must be a whole number >= 1, got 0"):
        run_simulated(fail, 0)
