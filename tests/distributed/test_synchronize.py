from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import LOCAL, train, train_alone
from torch import nn

from hessianflow.distributed.launch import run_local
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.interfaces import Hits, StepResult
from hessianflow.losses import weighted as sum_of

STEPS = 20


def of_mean(loss, weight, hits=None, rows=1) -> StepResult:
    """The result of rows whose mean loss is `loss`."""
    return StepResult(sum_of(loss.detach(), weight), weight, hits, rows)


def check_equal(found: dict, expected: dict) -> None:
    # float64, 20 steps of momentum: rounding differs by the order of the sums only.
    assert torch.allclose(found["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-10)
    assert found["hits"] == expected["hits"]
    assert found["sizes"] == expected["sizes"]


def test_two_ranks_equal_one_process():
    """The oracle trains whole batches in a plain torch loop; shares are 8 + 8 and 5 + 6, tails 2
    and 3 of 3."""
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
    """Rank 0 holds no example, rank 1 three; the third parameter is used by neither, the second by
    rank 1 alone."""
    used, partly, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    sync = GradientSynchronizer([used, partly, unused], reducer)
    if reducer.rank == 0:
        sync.begin(0)
        totals, counts = sync.finish(None, [1, 0])
    else:
        sync.begin(3)
        loss = (used * 2).sum() + (partly * 3).sum()
        with sync.last_backward():
            loss.backward()
        totals, counts = sync.finish(of_mean(loss, 3, Hits(torch.tensor(2), 3), 3), [1, 0])
    return totals, counts, used.grad, partly.grad, unused.grad


def test_a_rank_without_examples_takes_part():
    for totals, counts, used, partly, unused in run_local(unequal, 2):
        assert (float(totals.loss), totals.examples, counts) == (10.0, 3, (2, 0))
        assert (int(totals.hits.correct), int(totals.hits.counted)) == (2, 3)
        assert used.tolist() == [2.0, 2.0]
        assert partly.tolist() == [3.0, 3.0]
        assert unused is None, "a parameter no rank used must stay out of weight decay and momentum"


def weighted(reducer):
    """Class weights 1 and 3: rank 0 holds two examples of the first class, rank 1 one of the
    second."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    targets = torch.tensor([[0, 0], [1]][reducer.rank])
    classes = torch.tensor([1.0, 3.0], dtype=torch.float64)
    sync = GradientSynchronizer([weight], reducer)
    sync.begin(len(targets), weight=float(classes[targets].sum()))
    loss = F.cross_entropy(
        weight.expand(len(targets), 2) + targets[:, None], targets, weight=classes
    )
    with sync.last_backward():
        loss.backward()
    return sync.finish(of_mean(loss, float(classes[targets].sum())))[0].loss, weight.grad


def test_weighted_losses_keep_their_own_mean():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    targets = torch.tensor([0, 0, 1])
    classes = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = F.cross_entropy(weight.expand(3, 2) + targets[:, None], targets, weight=classes)
    expected.backward()
    for loss, gradient in run_local(weighted, 2):
        assert float(loss) == pytest.approx(expected.item(), abs=1e-14)
        assert torch.allclose(gradient, weight.grad, rtol=0, atol=1e-14)


def ignoring(reducer):
    """Every target of rank 1 is ignored: its loss and gradients are nan, and must not reach rank
    0's."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    sync = GradientSynchronizer([weight], reducer)
    sync.begin(3, weight=3.0 if reducer.rank == 0 else 0.0)
    loss = weight.sum() * (2.0 if reducer.rank == 0 else float("nan"))
    with sync.last_backward():
        loss.backward()
    totals, _ = sync.finish(of_mean(loss, 3.0 if reducer.rank == 0 else 0.0))
    return float(totals.loss), weight.grad.tolist(), totals.examples


def test_a_rank_whose_targets_are_all_ignored():
    assert run_local(ignoring, 2) == [(4.0, [2.0, 2.0], 6)] * 2


def repeated(reducer):
    """The last pass fails after its first bucket has left, and is repeated in two parts."""
    early, late = (nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(2))
    scale = reducer.rank + 1.0
    sync = GradientSynchronizer([early, late], reducer, bucket_bytes=1)
    sync.begin(2)
    with sync.last_backward():
        (late * scale).sum().backward()  # the bucket of `late` leaves; here the memory ends
    early.grad = late.grad = None
    (0.5 * (late + early) * scale).sum().backward()
    with sync.last_backward():
        (0.5 * (late + early) * scale).sum().backward()
    sync.finish()
    return early.grad.tolist(), late.grad.tolist()


def test_a_repeated_pass():
    assert run_local(repeated, 2) == [([1.5] * 3, [1.5] * 3)] * 2


def only_ignored(reducer):
    weight = nn.Parameter(torch.ones(1))
    sync = GradientSynchronizer([weight], reducer)
    weight.grad = torch.zeros(1)
    sync.begin(4, weight=0.0)
    nothing = of_mean(torch.tensor(float("nan")), 0.0)
    totals, _ = sync.finish(replace(nothing, twins=nothing))
    return float(totals.loss), totals.divisor, float(totals.twins.loss), weight.grad.tolist()


def test_only_ignored_targets_count_for_nothing():
    assert run_local(only_ignored, 2) == [(0.0, 0.0, 0.0, [0.0])] * 2


def layouts(reducer):
    conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    half = nn.Linear(3, 3).to(torch.bfloat16)
    parameters = [*conv.parameters(), *half.parameters()]
    sync = GradientSynchronizer(parameters, reducer)
    sync.begin(1 + reducer.rank)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0 * (1 + reducer.rank))
    sync.finish()
    return [
        (p.grad.dtype, p.grad.stride() == p.stride(), p.grad.float().unique().tolist())
        for p in parameters
    ]


def test_memory_layout_and_types_are_kept():
    """Weights 1/3 and 2/3 of the gradients 3 and 6: 1 + 4 = 5, exact in bfloat16 up to its 3
    digits."""
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
    assert sync.finish(of_mean(torch.tensor(1.0), 4))[0].hits is None


def test_bad_input():
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientSynchronizer([torch.ones(1)], LOCAL)
    sync = GradientSynchronizer([nn.Parameter(torch.ones(1))], LOCAL)
    sync.begin(0)
    with pytest.raises(ValueError, match="0 examples over all ranks"):
        sync.finish()


def sparse(reducer):
    table = nn.Embedding(5, 2, sparse=True)
    sync = GradientSynchronizer(table.parameters(), reducer)
    sync.begin(1)
    table(torch.tensor([1])).sum().backward()
    sync.finish()


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="sparse=False"):
        run_local(sparse, 2)
