"""Hooks on parameters act as in a bare loop on the whole batch, whatever the microbatches, whoever
looks on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.data import AdaptiveBatches
from hessianflow.optim import CLARS, GradientMoments
from hessianflow.training import Passes, Reporting

SOURCE = torch.Generator().manual_seed(1)
INPUTS = torch.randn(64, 6, generator=SOURCE, dtype=torch.float64)
TARGETS = torch.randint(3, (64,), generator=SOURCE)


def batches() -> AdaptiveBatches:
    return AdaptiveBatches(TensorDataset(INPUTS, TARGETS), 16)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3).double()


def only_row_0(parameter: Tensor) -> None:
    parameter.grad[1:] = 0


def clamp(parameter: Tensor) -> None:
    """Not linear: it tells a gradient that is whole from one that is not yet."""
    parameter.grad.clamp_(-0.05, 0.05)


def trained(hook: Callable[[Tensor], None], **options: Any) -> nn.Linear:
    model = network()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    settings: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(),
        "epochs": 1,
        "reporting": Reporting(show_progress=False),
    }
    settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.5)
    AdaptiveBatchTrainer(model, batches(), **(settings | options)).fit()
    return model


def by_hand(hook: Callable[[Tensor], None]) -> nn.Linear:
    model = network()
    for inputs, targets in batches():
        model.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                hook(parameter)
                parameter -= 0.5 * parameter.grad
    return model


@pytest.mark.parametrize("hook", [only_row_0, clamp])
@pytest.mark.parametrize("microbatch_size", [16, 8, 3])
@pytest.mark.parametrize("observed", [False, True])
def test_hooks_on_accumulation_see_the_whole_gradient_once_a_step(
    hook, microbatch_size: int, observed: bool
):
    observers = [GradientMoments()] if observed else []
    ours, theirs = (
        trained(hook, passes=Passes(microbatch_size=microbatch_size), observers=observers),
        by_hand(hook),
    )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    if hook is only_row_0:
        assert torch.equal(ours.weight[1:], network().weight[1:])


def test_observers_are_shown_the_gradient_before_such_hooks():
    """That of each microbatch, at a rate of 0, where it is known; the oracle averages squared norms
    by hand."""
    moments, model = GradientMoments(), network()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(only_row_0)
    AdaptiveBatchTrainer(
        model,
        batches(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=1,
        passes=Passes(microbatch_size=8),
        observers=[moments],
        reporting=Reporting(show_progress=False),
    ).fit()
    squares = []
    for inputs, targets in batches():
        for part in (slice(0, 8), slice(8, 16)):
            model.zero_grad()
            loss = cross_entropy(model(inputs[part]), targets[part])
            squares.append(
                sum(
                    float(g.square().sum())
                    for g in torch.autograd.grad(loss, list(model.parameters()))
                )
            )
    assert moments.signals()["small_gradient_sq"] == pytest.approx(
        sum(squares) / len(squares), rel=1e-12
    )


@pytest.mark.parametrize("microbatch_size", [16, 8])
def test_a_hook_on_gradients_acts_alike_with_and_without_observers(microbatch_size: int):
    """Not linear, too: it must be given the same numbers, not the mean of a microbatch here and its
    share there."""

    def run(observers: list[Any]) -> Tensor:
        model = network()
        model.weight.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
        settings: dict[str, Any] = {
            "loss_fn": nn.CrossEntropyLoss(),
            "epochs": 1,
            "reporting": Reporting(show_progress=False),
        }
        settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.5)
        AdaptiveBatchTrainer(
            model,
            batches(),
            observers=observers,
            passes=Passes(microbatch_size=microbatch_size),
            **settings,
        ).fit()
        return model.weight

    assert torch.equal(run([]), run([GradientMoments()]))


def test_looking_on_changes_nothing_bit_for_bit():
    """Also where microbatches differ in size, so that their weights are no powers of two."""

    def run(observers: list[Any]) -> Tensor:
        return trained(
            lambda parameter: None, passes=Passes(microbatch_size=5), observers=observers
        ).weight

    assert torch.equal(run([]), run([GradientMoments(accumulate=True)]))


def test_a_hook_that_steps_and_drops_the_gradient():
    """An "optimizer in the backward pass": as plain SGD of the same batches."""
    model = network()

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.5 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    AdaptiveBatchTrainer(
        model,
        batches(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=1,
        passes=Passes(microbatch_size=4),
        reporting=Reporting(show_progress=False),
    ).fit()
    torch.testing.assert_close(
        model.weight, by_hand(lambda parameter: None).weight, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(
    "options",
    [{"passes": Passes(max_grad_norm=1.0)}, {"observers": [GradientMoments()]}, {"clars": True}],
)
def test_sparse_gradients_are_refused_by_name(options: dict[str, Any]):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    data = TensorDataset(torch.randint(10, (32, 2)), torch.randint(3, (32,)))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if options.pop("clars", False):
        optimizer = CLARS(model.parameters(), 0.1)
        options = {"observers": [optimizer.norms]}
    run = AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(data, 8),
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        epochs=1,
        reporting=Reporting(show_progress=False),
        **options,
    )
    with pytest.raises(
        HessianFlowError, match=r"the gradient of 0.weight is sparse, which .* sparse=False"
    ):
        run.fit()
