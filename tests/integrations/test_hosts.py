"""Parts that all hosts share: releases, the factor of the rate, passes, readings, decisions."""

import importlib
import importlib.metadata
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

import hessianflow as hf
from hessianflow.distributed import current_world
from hessianflow.integrations.hosts import check_host
from hessianflow.integrations.passes import Passes
from hessianflow.integrations.rate import RateFactor, bare
from hessianflow.integrations.steering import Plan, Steering, make_probe
from hessianflow.interfaces import HessianFlowError


def data(count: int = 100) -> TensorDataset:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def passes(batch_size: int = 16, count: int = 100) -> Passes:
    batches = hf.data.AdaptiveBatches(data(count), batch_size)
    batches.set_shard(0, 1)
    return Passes(batches)


@pytest.mark.parametrize("package", ["transformers", "lightning", "accelerate"])
def test_an_absent_or_unsupported_host_is_named_with_its_range_and_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hessianflow.integrations.{package}"
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
    monkeypatch.setattr("hessianflow.integrations.hosts.version", lambda _: "99.0rc1")
    for module in (name, f"{name}_callbacks"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    pattern = rf"{package}>=\S+,<\S+, got 99.0rc1: pip install 'hessianflow\[{package}\]'$"
    with pytest.raises(HessianFlowError, match=pattern):
        importlib.import_module(name)

    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("hessianflow.integrations.hosts.version", absent)
    with pytest.raises(HessianFlowError, match=rf"needs {package}>=\S+, which is not installed"):
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("found", "fits"), [("2.4.9", False), ("2.5", True), ("2.6.0.dev1", True), ("3.0", False)]
)
def test_a_release_is_compared_by_its_numbers(
    found: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hessianflow.integrations.hosts.version", lambda _: found)
    if fits:
        check_host("some", (2, 5), (3,))
    else:
        with pytest.raises(HessianFlowError, match=r"some>=2\.5,<3"):
            check_host("some", (2, 5), (3,))


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_factor_is_in_force_only_during_steps(rate: float | torch.Tensor) -> None:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = SGD([{"params": [weight]} for weight in weights], lr=rate)
    factor = RateFactor(optimizer)
    factor.factor = 3.0
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [weight.item() for weight in weights] == pytest.approx([-0.3, -0.3])
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    assert factor.value == pytest.approx(0.3)
    factor.remove()
    optimizer.step()
    assert weights[0].item() == pytest.approx(-0.4)


def test_a_step_that_raises_leaves_the_scheduled_rate_at_the_next() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.1)
    factor = RateFactor(optimizer)
    factor.factor = 2.0

    def fails() -> float:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(fails)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.2)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_wrappers_of_hosts_are_opened() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.optimizer = optimizer

    assert bare(Wrapper()) is optimizer
    assert bare(optimizer) is optimizer


@pytest.mark.parametrize("count", [4, 5, 7, 32, 41, 96, 97])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_a_pass_has_as_many_batches_as_its_length_says(count: int, batch_size: int) -> None:
    stream = passes(batch_size, count)
    for _ in range(2):
        length = len(stream)
        sizes = [len(inputs) for inputs, _ in stream]
        assert len(sizes) == length
        assert sum(sizes) == count


def test_the_length_follows_a_change_in_the_middle_of_a_pass() -> None:
    stream = passes(8, 96)
    seen = []
    for number, (inputs, _) in enumerate(stream):
        seen.append(len(inputs))
        if number == 3:
            stream.set_batch_size(32)
            assert len(stream) == 6
    assert seen == [8] * 4 + [32, 32]
    assert stream.epoch == 1


def test_a_host_that_counts_batches_need_not_read_to_the_end() -> None:
    stream = passes(25)
    for epoch in range(3):
        iterator = iter(stream)
        batches = [next(iterator) for _ in range(len(stream))]
        assert sum(len(inputs) for inputs, _ in batches) == 100
        assert stream.epoch == epoch + 1
        assert stream.examples == 100 * (epoch + 1)
        assert stream.left == 0


@pytest.mark.parametrize("taken", [1, 4], ids=["in the middle", "at the end"])
def test_a_state_continues_with_the_next_batch(taken: int) -> None:
    one, other = passes(25), passes(25)
    iterator = iter(one)
    for _ in range(taken):
        next(iterator)
    other.load_state_dict(one.state_dict())
    expected = next(iterator, None)
    if expected is None:
        expected = next(iter(one))
    assert torch.equal(next(iter(other))[0], expected[0])
    assert len(other) == 4


def test_batches_that_cannot_change_are_refused() -> None:
    with pytest.raises(HessianFlowError, match=r"got DataLoader: use hf\.data\.AdaptiveBatches"):
        Passes(torch.utils.data.DataLoader(data()))


def steered(controller: object, every: int | None, total: int = 400, **options: object) -> Steering:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    world = current_world()
    batch = hf.data.AdaptiveBatches(data(), 8).sample(32)
    chosen = {"budget": None, **options}
    probe = make_probe(model, nn.CrossEntropyLoss(), batch, optimizer, world, controller, chosen)
    steering = Steering(controller, every)
    steering.start(Plan(100, total, "a test"), optimizer, probe, world)
    return steering


def test_steering_measures_at_every_interval_and_gives_the_share_of_the_edge() -> None:
    steering = steered(None, 50)
    figures = [steering.after_update(examples, None) for examples in range(25, 201, 25)]
    assert [bool(each) for each in figures] == [False, True] * 4
    share = 0.1 * figures[1]["curvature/sharpness"] / 3.8
    assert figures[1]["curvature/edge_share"] == pytest.approx(share)


def test_the_share_of_the_edge_is_that_of_the_rate_in_force() -> None:
    plain, doubled = steered(None, 50), steered(None, 50)
    assert doubled.rate is not None
    doubled.rate.factor = 2.0
    one = plain.after_update(50, None)["curvature/edge_share"]
    assert doubled.after_update(50, None)["curvature/edge_share"] == pytest.approx(2 * one)


def test_readings_stay_within_the_budget_after_the_first() -> None:
    steering = steered(None, 1000, sys.maxsize, budget=0.01)
    figures = [steering.after_update(examples, None) for examples in range(1000, 10**6 + 1, 1000)]
    assert steering.probe is not None
    assert 2 <= sum(map(bool, figures)) < 100
    assert steering.probe.state_dict()["spent"] <= 0.01 * 1_000_000


def test_a_controller_decides_in_the_middle_of_a_pass_and_not_at_the_end_of_the_run() -> None:
    steering = steered(hf.control.AdaBatch(8, 64, every_epochs=1), 40, total=200)
    sizes = []
    for examples in range(20, 201, 20):
        steering.after_update(examples, 1.0)
        assert steering.decision is not None
        sizes.append(steering.decision.batch_size)
    assert sizes == [8, 16, 16, 32, 32, 64, 64, 64, 64, 64]


def test_a_state_loaded_before_the_start_continues_equally() -> None:
    whole = steered(hf.control.CriticalBatch(8, 64), 50)
    for examples in (25, 50, 75, 100):
        whole.after_update(examples, torch.tensor(1 / examples))
    later = Steering(hf.control.CriticalBatch(8, 64), 50)
    later.load_state_dict(whole.state_dict())
    assert later.decision == whole.decision
    other = steered(hf.control.CriticalBatch(8, 64), 50)
    other.load_state_dict(whole.state_dict())
    for examples in (125, 150, 175):
        one = whole.after_update(examples, torch.tensor(0.5))
        two = other.after_update(examples, torch.tensor(0.5))
        one.pop("curvature/seconds", None)
        two.pop("curvature/seconds", None)
        assert one == two


def test_signals_that_a_host_does_not_give_are_refused() -> None:
    with pytest.raises(HessianFlowError, match=r"NoiseScale needs large_batch_size, .* a test"):
        steered(hf.control.NoiseScale(8, 64), None)


def test_a_checkpoint_without_a_controller_is_refused() -> None:
    with pytest.raises(HessianFlowError, match="made without a controller"):
        Steering(hf.control.FixedBatch(8), None).load_state_dict(Steering(None, None).state_dict())


def test_a_process_without_a_group_is_a_world_of_its_own() -> None:
    world = current_world()
    assert (world.rank, world.world_size) == (0, 1)
    assert world.broadcast({"a": 1}) == {"a": 1}
