"""A run writes and reads the state of its parts in one order, and all of it by itself."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import FGSM, ConcurrentAdversary
from hessianflow.control import FixedBatch
from hessianflow.data import DeviceBatches
from hessianflow.optim import GradientMoments
from hessianflow.runs import checkpoints
from hessianflow.training import Checkpoints, Reporting


class Noted:
    """A state that notes when it is put back."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self._name = name
        self._notes = notes

    def state_dict(self) -> dict[str, Any]:
        return {"name": self._name}

    def load_state_dict(self, state: Any) -> None:
        self._notes.append(state["name"])


def trainer(notes: list[str], run_dir: Path | None = None) -> AdaptiveBatchTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    source = torch.Generator().manual_seed(1)
    images = torch.randn(24, 1, 2, 2, generator=source)
    targets = torch.randint(3, (24,), generator=source)
    return AdaptiveBatchTrainer(
        model,
        DeviceBatches(images, targets, 8),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=1,
        controller=FixedBatch(8),
        adversary=ConcurrentAdversary(FGSM(0.1, value_range=None), share=0.5, staleness=1),
        observers=[GradientMoments()],
        checkpoints=Checkpoints(state={"noted": Noted("state", notes)}),
        run_dir=run_dir,
        reporting=Reporting(show_progress=False),
    )


def test_attacks_under_way_end_before_the_adversary_is_asked_for_its_state():
    names = list(trainer([])._loop.keeper.state.components)
    assert names.index("look-ahead") < names.index("adversary")
    assert names[:2] == ["train_data", "look-ahead"]
    assert names[-2:] == ["observer 0", "state noted"]


def test_parts_are_put_back_in_the_order_of_the_list():
    notes: list[str] = []
    made = trainer(notes)
    state = made._loop.keeper.state
    parts = list(state.components.items())
    parts.insert(0, ("first", Noted("first", notes)))
    parts.insert(5, ("middle", Noted("middle", notes)))
    parts.append(("last", Noted("last", notes)))
    state.components = dict(parts)
    made.load_state_dict(made.state_dict())
    assert notes == ["first", "middle", "state", "last"]


def test_generators_of_all_ranks_are_in_what_a_run_saves_and_one_ranks_in_its_state(
    tmp_path: Path,
):
    made = trainer([], tmp_path / "run")
    made.fit()
    saved = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert len(saved["rank_generators"]) == 1
    assert torch.equal(saved["rank_generators"][0]["torch"], saved["generators"]["torch"])
    assert "rank_generators" not in made.state_dict()


def test_a_rank_continues_its_own_generator_and_a_new_rank_gets_another():
    made = trainer([])
    state = made.state_dict()
    torch.manual_seed(5)
    other = {**state["generators"], "torch": torch.get_rng_state()}
    state["rank_generators"] = [state["generators"], other]
    run_state = made._loop.keeper.state
    drawn = []
    for rank in (0, 1, 2):
        run_state.restore(state, "the test", rank)
        drawn.append(torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(drawn[1], torch.rand(4))
    torch.set_rng_state(state["generators"]["torch"])
    assert torch.equal(drawn[0], torch.rand(4))
    assert not torch.equal(drawn[2], drawn[0])
    assert not torch.equal(drawn[2], drawn[1])
