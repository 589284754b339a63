import pytest
import torch
from ranks import LOCAL, train, train_alone
from torch import nn

from hessianflow.distributed.launch import run_local
from hessianflow.distributed.synchronize import GradientSynchronizer

STEPS = 20


def check_equal(found: dict, expected: dict) -> None:
    # float64, 20 steps of momentum: rounding differs by the order of the sums only.
    assert torch.allclose(found["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-10)
    assert found["hits"] == expected["hits"]
    assert found["sizes"] == expected["sizes"]


def test_two_ranks_equal_one_process():
    """The oracle trains whole batches in a plain torch loop; shares are 8 + 8 and 5 + 6, tails 2 and 3 of 3."""
    first, second = run_local(train, 2, STEPS)
    check_equal(first, train_alone(STEPS))
    assert torch.equal(first["weights"], second["weights"]), "ranks must stay bitwise together"
    assert first["losses"] == second["losses"]


def test_one_bucket_and_many_give_the_same():
    one, many = (run_local(train, 2, 6, 3, size)[0]["weights"] for size in (2**20, 1))
    assert torch.allclose(one, many, rtol=0, atol=1e-13)


def test_one_process_equals_a_plain_loop():
    check_equal(train(LOCAL, STEPS), train_alone(STEPS))


def unequal(reducer):
    """Rank 0 holds no example, rank 1 three; the third parameter is used by neither, the second by rank 1 alone."""
    used, partly, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    sync = GradientSynchronizer([used, partly, unused], reducer)
    if reducer.rank == 0:
        sync.begin(0, flag=True)
        totals = sync.finish(None, None)
    else:
        sync.begin(3)
        loss = (used * 2).sum() + (partly * 3).sum()
        with sync.last_backward():
            loss.backward()
        totals = sync.finish(loss, torch.tensor(2))
    return totals, used.grad, partly.grad, unused.grad


def test_a_rank_without_examples_takes_part():
    for totals, used, partly, unused in run_local(unequal, 2):
        assert (float(totals.loss), int(totals.correct), totals.examples, totals.flags) == (10.0, 2, 3, 1)
        assert used.tolist() == [2.0, 2.0]
        assert partly.tolist() == [3.0, 3.0]
        assert unused is None, "a parameter no rank used must stay out of weight decay and momentum"


def layouts(reducer):
    conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    half = nn.Linear(3, 3).to(torch.bfloat16)
    parameters = [*conv.parameters(), *half.parameters()]
    sync = GradientSynchronizer(parameters, reducer)
    sync.begin(1 + reducer.rank)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0 * (1 + reducer.rank))
    sync.finish(torch.tensor(1.0), None)
    return [(p.grad.dtype, p.grad.stride() == p.stride(), p.grad.float().unique().tolist()) for p in parameters]


def test_memory_layout_and_types_are_kept():
    """Weights 1/3 and 2/3 of the gradients 3 and 6: 1 + 4 = 5, exact in bfloat16 up to its 3 digits."""
    for result in run_local(layouts, 2):
        assert [dtype for dtype, _, _ in result] == [torch.float32] * 2 + [torch.bfloat16] * 2
        assert all(same for _, same, _ in result)
        for _, _, values in result:
            assert values == pytest.approx([5.0], rel=0.01)


def test_uncounted_hits_stay_uncounted():
    weight = nn.Parameter(torch.ones(1))
    sync = GradientSynchronizer([weight], LOCAL)
    sync.begin(4)
    weight.grad = torch.ones(1)
    assert sync.finish(torch.tensor(1.0), None).correct is None


def test_bad_input():
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientSynchronizer([torch.ones(1)], LOCAL)
    sync = GradientSynchronizer([nn.Parameter(torch.ones(1))], LOCAL)
    sync.begin(0)
    with pytest.raises(ValueError, match="0 examples over all ranks"):
        sync.finish(None, None)


def sparse(reducer):
    table = nn.Embedding(5, 2, sparse=True)
    sync = GradientSynchronizer(table.parameters(), reducer)
    sync.begin(1)
    table(torch.tensor([1])).sum().backward()
    sync.finish(torch.tensor(1.0), None)


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="sparse=False"):
        run_local(sparse, 2)
