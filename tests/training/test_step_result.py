"""Results of a loss add up, from parts of a batch to ranks and epochs; ranks agree in the same
exchange."""

from typing import Any

import pytest
import torch
from torch import nn

from hessianflow.batches import split
from hessianflow.distributed import GroupReducer, GroupWorld, run_simulated
from hessianflow.interfaces import AgreedError, HessianFlowError, Hits, StepResult, Wishes
from hessianflow.training.world import LocalWorld

LOSSES = torch.tensor([0.5, 2.0, 1.0, 4.0, 3.0], dtype=torch.float64)


def result(losses: torch.Tensor, **further: Any) -> StepResult:
    """Rows with these losses; those of 2 and more are no hits."""
    rows = len(losses)
    hits = Hits((losses < 2).sum(), rows)
    return StepResult(losses.sum(), rows, **({"hits": hits, "rows": rows} | further))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_of_any_size_add_up_to_the_whole(size: int):
    """The mean of 0.5, 2, 1, 4, 3 is 2.1; two of them are hits."""
    parts = [result(losses) for losses, _ in split((LOSSES, LOSSES), size)]
    whole = sum(parts[1:], parts[0])
    assert float(whole.loss) == pytest.approx(2.1, abs=1e-15)
    assert whole.hits is not None
    assert (int(whole.hits.correct), whole.hits.counted, whole.rows) == (2, 5, 5)


def test_weights_on_the_device_and_on_the_host_add_up():
    """(2 * 1 + 3 * 4) / 5 = 2.8."""
    host = StepResult(torch.tensor(2.0), 2, None, 2)
    device = StepResult(torch.tensor(12.0), torch.tensor(3.0), None, 7)
    assert float((host + device).loss) == pytest.approx(2.8)
    assert float((device + host).loss) == pytest.approx(2.8)


def test_hits_of_some_rows_that_are_not_counted_leave_none():
    assert (result(LOSSES) + result(LOSSES, hits=None)).hits is None
    assert (result(LOSSES, hits=None) + result(LOSSES)).hits is None


def test_nothing_adds_nothing_and_has_no_loss():
    nothing = StepResult(torch.zeros(()), 0)
    on_device = StepResult(torch.zeros(()), torch.zeros(()))
    assert float(nothing.loss) == float(on_device.loss) == 0.0
    for whole in (nothing + result(LOSSES), result(LOSSES) + nothing):
        assert whole.hits is not None
        assert (float(whole.loss), whole.rows) == (pytest.approx(2.1), 5)


def test_twins_and_failures_are_kept():
    failure = HessianFlowError("it cannot be cut")
    twins = result(LOSSES[:2])
    whole = result(LOSSES, twins=twins) + result(LOSSES, twins=twins, failure=failure)
    assert whole.twins is not None
    assert (whole.twins.rows, float(whole.twins.loss), whole.failure) == (4, 1.25, failure)
    assert (result(LOSSES) + result(LOSSES, twins=twins)).twins is twins


def reduced(reducer: GroupReducer, refused: int | None, wishes: list[Wishes]) -> Any:
    """Each rank's share, of 2 and 3 rows: the result of both, and what they agree on."""
    world = GroupWorld(reducer)
    model = nn.Linear(1, 1, bias=False)
    world.attach(model, list(model.parameters()))
    world.post(lambda: wishes[reducer.rank])
    own = result([LOSSES[:2], LOSSES[2:]][reducer.rank])
    if refused == reducer.rank:
        own = result(LOSSES, failure=HessianFlowError(f"refused on rank {refused}"))
    world.begin(own.rows)
    with world.last_backward(own.rows):
        model(torch.ones(1, 1)).sum().backward()
    return world.finish(own), world.agreed


def test_ranks_add_up_to_one_result_and_agree_on_what_any_wishes():
    wishes = [Wishes(save=True), Wishes(stop=True)]
    for whole, agreed in run_simulated(reduced, 2, None, wishes):
        assert float(whole.loss) == pytest.approx(2.1, abs=1e-15)
        assert (int(whole.hits.correct), whole.rows, whole.examples) == (2, 5, 5)
        assert agreed == Wishes(stop=True, save=True, show=False)


def test_a_refusal_of_one_rank_is_one_on_all():
    (first, _), (second, _) = run_simulated(reduced, 2, 1, [Wishes(), Wishes()])
    assert str(second.failure) == "refused on rank 1"
    assert isinstance(first.failure, AgreedError)
    assert "another rank refuses the loss" in str(first.failure)


def test_a_world_of_one_asks_at_the_end_of_every_step():
    world = LocalWorld()
    asked: list[bool] = []

    def wishes() -> Wishes:
        asked.append(True)
        return Wishes(show=len(asked) == 2)

    world.post(wishes)
    assert world.agreed == Wishes()
    for number in (1, 2):
        world.begin(7)
        whole = world.finish(result(LOSSES))
        assert (whole.examples, whole.rows, len(asked)) == (7, 5, number)
    assert world.agreed == Wishes(show=True)
