"""Optimizers that ask for several gradients of one batch: SAM and extrapolation against loops, and
torch's LBFGS."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from torch import nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.adversarial import PGD
from hessianflow.control import FixedBatch
from hessianflow.data import DeviceBatches
from hessianflow.optim import SAM, Extrapolation, GradientMoments
from hessianflow.training import Passes, Reporting

N = 40


def data() -> DeviceBatches:
    return bright_or_dark(N, 16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any):
    settings: dict[str, Any] = {
        "epochs": 2,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
        "passes": Passes(norm_batch_size=0),
    }
    return AdaptiveBatchTrainer(model, data(), optimizer=optimizer, **(settings | options)).fit()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "make",
    [
        lambda model: SAM(sgd(model), rho=0.1, model=model),
        lambda model: Extrapolation(sgd(model), 0.05),
    ],
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
    train(
        ours,
        SAM(sgd(ours), rho=0.0, model=ours),
        passes=Passes(norm_batch_size=0, microbatch_size=5, max_grad_norm=0.5),
    )
    train(
        theirs, sgd(theirs), passes=Passes(norm_batch_size=0, microbatch_size=5, max_grad_norm=0.5)
    )
    assert_same(ours, theirs)


def test_extrapolation_looks_ahead_along_the_gradient_of_the_whole_batch():
    """However many microbatches it takes; a look-ahead of its own for each would move elsewhere."""
    ours, theirs = (
        nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    for model, size in ((ours, 5), (theirs, 16)):
        optimizer = Extrapolation(sgd(model.double()), 0.5)
        train(
            model,
            optimizer,
            passes=Passes(norm_batch_size=0, microbatch_size=size),
            transform=lambda x, y, _: (x.double(), y),
        )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_both_gradients_are_of_the_same_adversarial_examples():
    """The attack runs once a step: its random starts are counted once."""
    model = network()
    adversary = PGD(0.1, share=1, value_range=(0.0, 1.0), steps=1)
    train(
        model,
        SAM(sgd(model), rho=0.1, model=model),
        adversary=adversary,
        controller=FixedBatch(16),
    )
    assert adversary.state_dict()["calls"] == 6


def test_observers_see_the_first_gradient_of_a_step_alone():
    """40 examples in batches of 16, microbatches of 5: 4 + 4 + 2 of them an epoch."""
    model, seen = network(), GradientMoments(accumulate=True)
    train(
        model,
        SAM(sgd(model), rho=0.1, model=model),
        passes=Passes(norm_batch_size=0, microbatch_size=5),
        observers=[seen],
    )
    sums = seen.state_dict()
    assert (sums["small_count"], sums["large_count"], sums["examples"]) == (2 * 10, 2 * 3, 2 * N)


def test_lbfgs_gets_its_closure():
    model = network().eval()
    history = train(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), epochs=4)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]


@pytest.mark.parametrize("wrap", [SAM, lambda base: Extrapolation(base, 0.1)])
def test_loss_scaling_is_refused(wrap):
    optimizer = wrap(sgd(model := network()))
    message = (
        f"{type(optimizer).__name__} asks for several gradients a step, which loss scaling cannot"
    )
    with pytest.raises(HessianFlowError, match=message):
        train(model, optimizer, passes=Passes(norm_batch_size=0, precision="fp16"))


class TwoHalves(torch.optim.SGD):
    """As the common packages of SAM: the first half of a step uses the gradient that is there, the
    closure is for the second, and looks optional."""

    rho = 0.1

    @torch.no_grad()
    def first_step(self) -> None:
        params = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self._moves = [self.rho * p.grad / norm for p in params]
        for parameter, move in zip(params, self._moves, strict=True):
            parameter.add_(move)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, move in zip(self.param_groups[0]["params"], self._moves, strict=True):
            parameter.sub_(move)
        super().step()

    def step(self, closure=None):
        assert closure is not None, (
            "Sharpness Aware Minimization requires closure, but it was not provided"
        )
        self.first_step()
        closure()
        self.second_step()


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def as_double(inputs, targets, _):
    return inputs.double(), targets


@pytest.mark.parametrize("microbatch_size", [16, 5])
def test_a_sam_of_two_halves_is_that_of_ours(microbatch_size: int):
    """The oracle is our own SAM, held against a loop above; a stale first gradient would move
    elsewhere."""
    ours, theirs = plain_network(), plain_network()
    options: dict[str, Any] = {
        "transform": as_double,
        "passes": Passes(norm_batch_size=0, microbatch_size=microbatch_size),
    }
    train(ours, TwoHalves(ours.parameters(), lr=0.1, momentum=0.9), **options)
    train(theirs, SAM(sgd(theirs), rho=0.1), **options)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "error", [AssertionError("requires closure"), TypeError("'NoneType' object is not callable")]
)
def test_a_closure_that_only_looks_optional_is_asked_for_in_one_line(error: Exception):
    class NeedsClosure(torch.optim.SGD):
        def step(self, closure=None):
            if closure is None:
                raise error
            return super().step(closure)

    model = plain_network()
    start = [p.clone() for p in model.parameters()]
    with pytest.raises(
        HessianFlowError,
        match=r"NeedsClosure.step\(\) asks for a closure .* set `wants_closure = True`",
    ):
        train(model, NeedsClosure(model.parameters(), lr=0.1), transform=as_double)
    assert all(
        torch.equal(before, after) for before, after in zip(start, model.parameters(), strict=True)
    )
    optimizer = NeedsClosure(model.parameters(), lr=0.1)
    optimizer.wants_closure = True
    assert train(model, optimizer, transform=as_double).summary["status"] == "finished"


def test_other_errors_of_a_step_are_not_explained_away():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of luck")

    model = plain_network()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, Broken(model.parameters(), lr=0.1), transform=as_double)


class Newton(torch.optim.Optimizer):
    """Divides each gradient by the diagonal of the Hessian, found by differentiating `.grad`
    again."""

    is_second_order = True

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})
        self.seen: list[list[torch.Tensor]] = []

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        product = torch.autograd.grad(
            [p.grad for p in params], params, [torch.ones_like(p) for p in params]
        )
        self.seen.append([product[0].clone(), params[0].grad.detach().clone()])
        with torch.no_grad():
            for p, rows in zip(params, product, strict=True):
                p -= 0.1 * p.grad.detach() / (rows.abs() + 1)


@pytest.mark.parametrize("microbatch_size", [16, 5])
@pytest.mark.parametrize("observers", [[], [GradientMoments()]])
def test_gradients_can_be_differentiated_again(microbatch_size: int, observers: list[Any]):
    """The product of the Hessian of the whole batch, against a loop that makes one pass."""
    ours, theirs = plain_network(), plain_network()
    mine, other = Newton(ours.parameters()), Newton(theirs.parameters())
    train(
        ours,
        mine,
        transform=as_double,
        passes=Passes(norm_batch_size=0, microbatch_size=microbatch_size),
        observers=observers,
    )
    for _ in range(2):
        for inputs, targets in batches_of(other):
            loss = F.cross_entropy(theirs(inputs.double()), targets)
            gradients = torch.autograd.grad(loss, list(theirs.parameters()), create_graph=True)
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter.grad = gradient
            other.step()
            theirs.zero_grad()
    assert len(mine.seen) == len(other.seen) == 6
    for found, expected in zip(mine.seen, other.seen, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in ours.parameters())


def batches_of(optimizer: Newton) -> DeviceBatches:
    """The same stream for the second epoch as for the first."""
    if not hasattr(optimizer, "stream"):
        optimizer.stream = data()
    return optimizer.stream


def test_second_derivatives_under_loss_scaling_are_refused():
    model = network()
    with pytest.raises(
        HessianFlowError,
        match="Newton differentiates the gradient again, which it cannot where losses",
    ):
        train(model, Newton(model.parameters()), passes=Passes(norm_batch_size=0, precision="fp16"))


def test_what_is_no_optimizer_is_refused():
    model = network()
    two = [sgd(model), sgd(model)]
    with pytest.raises(
        HessianFlowError,
        match="optimizer must be one optimizer, got 2 of them: put them behind one",
    ):
        train(model, two)
    functional = SimpleNamespace(init=lambda params: None, update=lambda grads, state: None)
    listed = SimpleNamespace(param_groups=[tuple(model.parameters())], step=print, state_dict=dict)
    for made in (functional, listed, "sgd", None):
        with pytest.raises(
            HessianFlowError, match="optimizer must be a torch optimizer, with param_groups, step"
        ):
            train(model, made)
