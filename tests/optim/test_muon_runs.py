"""Muon in whole runs: what is recorded, on two ranks, under a schedule and inside of SAM."""

from typing import Any

import pytest
import torch
from ranks import data, network
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, History
from hessianflow.choices import build_optimizer
from hessianflow.config import TrainConfig
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import DeviceBatches
from hessianflow.distributed import GroupReducer, GroupWorld, run_local
from hessianflow.models import create
from hessianflow.optim import Muon, muon_groups
from hessianflow.resolve import resolve
from hessianflow.training import AfterEpoch, Reporting, Schedule
from hessianflow.training.world import LocalWorld


def trained(world: Any, steps: int = 3, **options: Any) -> tuple[list[torch.Tensor], History]:
    model = network().float()
    trainer = AdaptiveBatchTrainer(
        model,
        DeviceBatches(*data(), 16, seed=0),
        optimizer=Muon(muon_groups(model), 0.1, **options),
        loss_fn=F.cross_entropy,
        epochs=steps,
        schedule=Schedule(None),
        reporting=Reporting(show_progress=False),
        world=world,
    )
    history = trainer.fit()
    return [p.detach() for p in model.parameters()], history


def on_ranks(reducer: GroupReducer) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    return trained(GroupWorld(reducer))[0]


@pytest.mark.ranks
def test_two_ranks_give_the_weights_of_one_process() -> None:
    """Up to the order of sums over ranks, rounded in float32, which no step amplifies much."""
    alone, _ = trained(LocalWorld())
    for found in run_local(on_ranks, 2):
        for mine, other in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_record_says_which_parameters_are_stepped_by_which_rule() -> None:
    _, history = trained(LocalWorld(), 1)
    muon, rest = history.config["trainer"]["parameter_groups"]
    assert muon["parameters"] == ["0.weight", "2.weight"]
    assert (muon["part"], muon["rule"], muon["rate_factor"]) == ("unnormalised", "original", 0.125)
    assert rest["parameters"] == ["0.bias", "2.bias", "4.weight", "4.bias"]
    assert (rest["part"], rest["rule"], rest["rate_factor"]) == ("rest", "sgd", 0.4)


def test_the_record_says_once_that_curvature_is_measured_along_the_update() -> None:
    model = network().float()
    optimizer = Muon(muon_groups(model), 0.1)
    batches = DeviceBatches(*data(), 16, seed=0)
    trainer = AdaptiveBatchTrainer(
        model,
        batches,
        optimizer=optimizer,
        loss_fn=F.cross_entropy,
        epochs=2,
        schedule=Schedule(None),
        probe=CurvatureProbe(model, F.cross_entropy, batches.sample(16), optimizer=optimizer),
        after_epoch=AfterEpoch(curvature=True),
        reporting=Reporting(show_progress=False),
    )
    history = trainer.fit()
    assert len(history.curvature) == 2
    (event,) = history.of_kind("event")
    assert event["event"] == "curvature"
    assert event["message"].endswith("curvature is measured along its update")


def test_the_command_has_a_rate_and_groups_without_being_told() -> None:
    for optimizer in ("muon", {"name": "sam", "base": "muon"}):
        config = resolve(TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]
        assert config.lr == 0.24
        made = build_optimizer(config, create("digits-cnn", 10, 8))
        assert [group["part"] for group in made.param_groups] == ["normalised", "rest"]
        assert [group["rule"] for group in made.param_groups] == ["renormalised", "sgd"]


def test_a_step_without_a_gradient_on_a_rank_of_the_world_is_none() -> None:
    """A model whose matrices are all frozen after the start steps what is left."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Muon(muon_groups(model), 0.1)
    model[0].requires_grad_(False)
    model(torch.ones(2, 3)).sum().backward()
    before = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[1].weight in optimizer.state
