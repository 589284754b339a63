"""SAM on quadratics, where both gradients are known by hand."""

import copy

import pytest
import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import SAM, sam_perturbation

D = torch.float64


def test_perturbation_has_length_rho_over_all_parameters():
    """g = (3, 4) over two tensors: norm 5, so e = rho * (.6, .8)."""
    first, second = sam_perturbation(
        [torch.tensor([3.0], dtype=D), torch.tensor([[4.0]], dtype=D)], 0.5
    )
    assert first.item() == pytest.approx(0.3, abs=1e-15)
    assert second.item() == pytest.approx(0.4, abs=1e-15)


def test_zero_gradient_moves_nothing():
    assert sam_perturbation([torch.zeros(2)], 0.5)[0].tolist() == [0, 0]
    assert sam_perturbation([], 0.5) == []


def quadratic(weights):
    """f = (a x^2 + b y^2) / 2 with a=1, b=4."""
    return (weights[0] ** 2 + 4 * weights[1] ** 2).sum() / 2


def stepper(optimizer, weights):
    def closure():
        optimizer.zero_grad()
        loss = quadratic(weights)
        loss.backward()
        return loss.detach()

    return closure


def test_one_step_worked_by_hand():
    """At (3, 1): g = (3, 4), e = .5 (.6, .8) = (.3, .4), gradient there (3.3, 5.6), step .1: (2.67,
    .44)."""
    weights = [nn.Parameter(torch.tensor([v], dtype=D)) for v in (3.0, 1.0)]
    sam = SAM(torch.optim.SGD(weights, lr=0.1), rho=0.5)
    loss = sam.step(stepper(sam, weights))
    assert loss.item() == pytest.approx(6.5)
    assert [w.item() for w in weights] == pytest.approx([2.67, 0.44], abs=1e-14)


def test_rho_zero_is_the_base_optimizer_bit_for_bit():
    ours, theirs = (
        [nn.Parameter(torch.tensor([v], dtype=D)) for v in (3.0, 1.0)] for _ in range(2)
    )
    sam = SAM(torch.optim.SGD(ours, lr=0.1, momentum=0.9), rho=0.0)
    base = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for _ in range(20):
        sam.step(stepper(sam, ours))
        base.step(stepper(base, theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_state_and_schedule_go_to_the_base():
    weights = [nn.Parameter(torch.tensor([v], dtype=D)) for v in (3.0, 1.0)]
    sam = SAM(torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5)
    sam.step(stepper(sam, weights))
    schedule.step()
    assert sam.base.param_groups[0]["lr"] == 0.05
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    restored = SAM(torch.optim.SGD(copies, lr=1.0, momentum=0.9))
    restored.load_state_dict(copy.deepcopy(sam.state_dict()))
    sam.step(stepper(sam, weights))
    restored.step(stepper(restored, copies))
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def test_statistics_see_the_clean_weights_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    reference = copy.deepcopy(model)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model)

    def closure():
        sam.zero_grad()
        loss = (model(x)[:, 0] ** 3).mean()
        loss.backward()
        return loss

    sam.step(closure)
    reference(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))
    assert model[1].track_running_stats


def test_weights_are_put_back_when_the_second_closure_raises():
    weight = nn.Parameter(torch.tensor([3.0]))
    sam = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)

    def closure():
        if weight.item() != 3.0:
            raise KeyError
        weight.grad = torch.ones(1)

    with pytest.raises(KeyError):
        sam.step(closure)
    assert weight.item() == 3.0


def test_bad_input_is_named():
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for rho in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
            SAM(base, rho=rho)
    with pytest.raises(TypeError, match="closure"):  # it says by its signature that it needs one
        SAM(base).step()


def test_a_step_without_a_closure_says_what_it_needs():
    """As trainers of others call it."""
    sam = SAM(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(
        HessianFlowError, match=r"SAM needs two gradients per step: call step\(closure\)"
    ):
        sam.step(None)


@pytest.mark.parametrize(("base", "rho"), [("sgd", 0.1), (None, "wide")])
def test_what_cannot_step_or_measure_is_refused(base, rho):
    base = base or torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(
        HessianFlowError, match=r"SAM steps another optimizer|rho must be a finite number >= 0"
    ):
        SAM(base, rho=rho)
