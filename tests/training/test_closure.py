"""Optimizers that ask for several gradients of one batch: SAM and extrapolation against loops, and torch's LBFGS."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.adversarial import PGD, SAM
from hessianflow.control import FixedBatch
from hessianflow.data import DeviceBatches
from hessianflow.optim import Extrapolation, GradientMoments

N = 40


def data() -> DeviceBatches:
    images = torch.randint(256, (N, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return DeviceBatches(images, images.float().mean((1, 2, 3)).gt(127).long(), 16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any):
    settings: dict[str, Any] = {"epochs": 2, "loss_fn": F.cross_entropy, "show_progress": False, "norm_batch_size": 0}
    return AdaptiveBatchTrainer(model, data(), optimizer=optimizer, **(settings | options)).fit()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "make", [lambda model: SAM(sgd(model), rho=0.1, model=model), lambda model: Extrapolation(sgd(model), 0.05)]
)
def test_trains_as_in_a_loop_with_its_closure(make):
    ours, theirs = network(), network()
    history = train(ours, make(ours))
    optimizer, batches, losses = make(theirs), data(), []
    for _ in range(2):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(theirs(x), y)
                loss.backward()
                return loss.detach()

            losses.append(optimizer.step(closure).item() * len(y))
    assert_same(ours, theirs)
    assert history.epochs[-1]["train_loss"] == pytest.approx(sum(losses[3:]) / N, rel=1e-6)


def test_radius_zero_is_the_base_optimizer_bit_for_bit():
    ours, theirs = network(), network()
    train(ours, SAM(sgd(ours), rho=0.0, model=ours), microbatch_size=5, max_grad_norm=0.5)
    train(theirs, sgd(theirs), microbatch_size=5, max_grad_norm=0.5)
    assert_same(ours, theirs)


def test_extrapolation_looks_ahead_along_the_gradient_of_the_whole_batch():
    """However many microbatches it takes; a look-ahead of its own for each would move elsewhere."""
    ours, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for model, size in ((ours, 5), (theirs, 16)):
        optimizer = Extrapolation(sgd(model.double()), 0.5)
        train(model, optimizer, microbatch_size=size, transform=lambda x, y, _: (x.double(), y))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_both_gradients_are_of_the_same_adversarial_examples():
    """The attack runs once a step: its random starts are counted once."""
    model = network()
    adversary = PGD(0.1, value_range=(0.0, 1.0), steps=1)
    train(model, SAM(sgd(model), rho=0.1, model=model), adversary=adversary, controller=FixedBatch(16, 1.0))
    assert adversary.state_dict()["calls"] == 6


def test_observers_see_the_first_gradient_of_a_step_alone():
    """40 examples in batches of 16, microbatches of 5: 4 + 4 + 2 of them an epoch."""
    model, seen = network(), GradientMoments(accumulate=True)
    train(model, SAM(sgd(model), rho=0.1, model=model), microbatch_size=5, observers=[seen])
    sums = seen.state_dict()
    assert (sums["small_count"], sums["large_count"], sums["examples"]) == (2 * 10, 2 * 3, 2 * N)


def test_lbfgs_gets_its_closure():
    model = network().eval()
    history = train(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), epochs=4)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]


@pytest.mark.parametrize("wrap", [SAM, lambda base: Extrapolation(base, 0.1)])
def test_loss_scaling_is_refused(wrap):
    optimizer = wrap(sgd(model := network()))
    message = f"{type(optimizer).__name__} asks for several gradients a step, which loss scaling cannot"
    with pytest.raises(HessianFlowError, match=message):
        train(model, optimizer, precision="fp16")
