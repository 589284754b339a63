import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import classification, mlp
from ranks import LOCAL, data, network
from torch import nn

from hessianflow.curvature import (
    CallableOperator,
    CurvatureProbe,
    HessianOperator,
    NonFiniteError,
    top_eigenpairs,
)
from hessianflow.distributed import current_world
from hessianflow.distributed.curvature import AllReducedOperator, shard, sharded
from hessianflow.distributed.launch import run_local

EXAMPLES = 31  # 15 + 16 on two ranks


def measure(reducer):
    model, (inputs, targets) = network(), data()
    part, count = shard((inputs[:EXAMPLES], targets[:EXAMPLES]), reducer)
    base = HessianOperator(model, F.cross_entropy, part)
    operator = AllReducedOperator(base, reducer, weight=None if count else 0)
    result = top_eigenpairs(operator, 2, tol=1e-10, seed=5)
    operator.release()
    return result.values, result.vectors, result.matvecs, operator.total_weight


def dense_eigenvalues():
    """By numpy from the dense Hessian of `torch.autograd.functional`: neither our products nor our
    Lanczos."""
    model, (inputs, targets) = network(), data()
    names = [name for name, _ in model.named_parameters()]
    tensors = [p.detach() for p in model.parameters()]

    def loss(flat):
        pieces = torch.split(flat, [t.numel() for t in tensors])
        weights = {n: piece.view_as(t) for n, piece, t in zip(names, pieces, tensors, strict=True)}
        outputs = torch.func.functional_call(model, weights, (inputs[:EXAMPLES],))
        return F.cross_entropy(outputs, targets[:EXAMPLES])

    matrix = torch.autograd.functional.hessian(loss, torch.cat([t.reshape(-1) for t in tensors]))
    values = np.linalg.eigvalsh(matrix.numpy())
    return values[np.argsort(-np.abs(values))][:2]


@pytest.mark.slow
def test_two_ranks_find_the_eigenvalues_of_one_process():
    first, second = run_local(measure, 2)
    assert first[0].numpy() == pytest.approx(dense_eigenvalues(), abs=1e-8)
    assert first[2:] == second[2:], "every rank must take the same decisions"
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[3] == EXAMPLES
    alone = measure(LOCAL)
    assert alone[0].numpy() == pytest.approx(first[0].numpy(), abs=1e-8)


def nan_on_rank_one(reducer):
    matrix = torch.eye(3) * (float("nan") if reducer.rank else 1.0)

    def product(vector):
        if reducer.rank:
            raise NonFiniteError("the loss is not finite")
        return matrix @ vector

    operator = AllReducedOperator(CallableOperator(product, 3), reducer, weight=2)
    try:
        top_eigenpairs(operator, seed=0)
    except NonFiniteError as error:
        return str(error)


def test_a_failure_on_one_rank_reaches_all():
    first, second = run_local(nan_on_rank_one, 2, timeout_seconds=30)
    assert "product with the operator is not finite" in first
    assert second == "the loss is not finite"


class Pretend:
    """A rank of a larger world, for the arithmetic of shares."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_make_up_the_batch(world_size):
    batch = torch.arange(5), torch.arange(5)
    parts = [shard(batch, Pretend(rank, world_size)) for rank in range(world_size)]
    assert sum(count for _, count in parts) == 5
    held = [row for (inputs, _), count in parts if count for row in inputs.tolist()]
    assert held == [0, 1, 2, 3, 4]
    assert all(len(inputs) >= 1 for (inputs, _), _ in parts)


def empty_rank(reducer):
    matrix = (
        torch.diag(torch.tensor([1.0, 2.0])) if reducer.rank else torch.full((2, 2), float("nan"))
    )
    operator = AllReducedOperator(
        CallableOperator(lambda v: matrix @ v, 2), reducer, weight=reducer.rank * 4
    )
    return operator.matvec(torch.ones(2)).tolist()


@pytest.mark.slow
def test_a_rank_without_examples_adds_nothing():
    assert run_local(empty_rank, 2) == [[1.0, 2.0]] * 2


def test_no_examples_at_all():
    with pytest.raises(ValueError, match="no rank has an example"):
        AllReducedOperator(CallableOperator(lambda v: v, 2), LOCAL, weight=0)


def in_a_group_of_another(reducer):
    """As in a loop under accelerate, or with a DistributedDataParallel of the user's own."""
    world = current_world()
    problem = classification(mlp((5, 8, 4)), (5,), 32, 4)
    model = nn.parallel.DistributedDataParallel(problem.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer, "operator": sharded(world), "tol": 1e-6}
    probe = CurvatureProbe(model, problem.loss_fn, problem.pair, **options)
    reading = probe()
    assert (world.rank, world.world_size) == (reducer.rank, 2)
    alone = CurvatureProbe(problem.model, problem.loss_fn, problem.pair, which="LA", tol=1e-6)()
    return reading.eigenvalue, alone.eigenvalue, reading.details["edge_share"]


def test_a_probe_joins_the_group_that_is_there():
    first, second = run_local(in_a_group_of_another, 2)
    assert first == second
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[2] == pytest.approx(0.1 * first[0] / 2, rel=1e-5)
