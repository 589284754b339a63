"""`hf.monitor`: the figures of any loop, within a budget, without a trace."""

import copy
import math
from typing import Any

import pytest
import torch
from problems import classification, dense_hessian, mlp, train
from torch import nn
from torch.optim import LBFGS, SGD, Adam

import hessianflow as hf
from hessianflow import monitoring
from hessianflow.interfaces import HessianFlowError


def small() -> Any:
    problem = classification(mlp((5, 8, 4)), (5,), 128, 4)
    train(problem, 5)
    return problem


def monitored(problem: Any, optimizer: Any, **options: Any) -> dict[str, float]:
    figures = hf.monitor(problem.model, problem.loss_fn, problem.pair, optimizer, **options)
    assert tuple(figures) == monitoring.NAMES
    assert all(type(value) is float for value in figures.values())
    return figures


def test_the_figures_are_those_of_the_parts_they_come_from() -> None:
    problem = small()
    optimizer = SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    figures = monitored(problem, optimizer, seconds=math.inf)
    top = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    assert figures["sharpness"] == pytest.approx(top, rel=0.01)
    assert figures["edge_share"] == pytest.approx(0.05 * figures["sharpness"] / 3.8)
    found = hf.curvature.critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer)
    assert figures["critical_rate"] == pytest.approx(found.critical)
    noise = hf.curvature.noise_scale(
        problem.model, problem.loss_fn, problem.pair, parts=monitoring.PARTS, norm_mode="batch"
    )
    assert figures["noise_scale"] == pytest.approx(noise.simple.value)
    assert figures["critical_batch"] == pytest.approx(noise.with_curvature.value)
    assert figures["learning_rate"] == 0.05
    assert figures["threshold"] == pytest.approx(3.8)
    assert figures["converged"] == 1
    assert figures["products"] > 3


def test_before_adams_first_step_it_is_measured_along_the_update() -> None:
    problem = small()
    optimizer = Adam(problem.model.parameters(), lr=0.01)
    figures = monitored(problem, optimizer, seconds=math.inf)
    assert figures["threshold"] == 2
    assert figures["edge_share"] == pytest.approx(0.01 / figures["critical_rate"])
    problem.loss_fn(problem.model(problem.inputs), problem.targets).backward()
    optimizer.step()
    assert monitored(problem, optimizer, seconds=math.inf)["threshold"] == pytest.approx(38)


def test_it_leaves_no_trace() -> None:
    problem = small()
    optimizer = Adam(problem.model.parameters(), lr=0.01)
    problem.loss_fn(problem.model(problem.inputs), problem.targets).backward()
    optimizer.step()
    problem.model.train()
    before = copy.deepcopy(problem.model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in problem.model.parameters()]
    generator = torch.get_rng_state()
    monitored(problem, optimizer)
    assert torch.equal(torch.get_rng_state(), generator)
    assert problem.model.training
    for parameter, gradient in zip(problem.model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert all(torch.equal(v, problem.model.state_dict()[k]) for k, v in before[0].items())
    after = optimizer.state_dict()
    for index, state in before[1]["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in state.items())


def test_a_budget_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by a second whenever it is read: the first product costs one second."""
    problem = small()
    optimizer = SGD(problem.model.parameters(), lr=0.05)
    now = iter(range(1000))
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: float(next(now)))
    least = monitored(problem, optimizer, seconds=1e-3)
    assert math.isfinite(least["critical_rate"])
    assert least["products"] == 1
    for name in ("sharpness", "edge_share", "noise_scale", "critical_batch"):
        assert math.isnan(least[name])
    some = monitored(problem, optimizer, seconds=1 + 4.5 * monitoring.KEPT)
    assert 2 <= some["products"] <= 5  # the sharpness, with few products
    assert math.isfinite(some["sharpness"])
    assert math.isnan(some["noise_scale"])


def test_what_cannot_be_known_is_nan() -> None:
    problem = small()
    figures = monitored(problem, LBFGS(problem.model.parameters()), seconds=math.inf)
    for name in ("critical_rate", "sharpness", "edge_share"):
        assert math.isnan(figures[name])
    problem.inputs, problem.targets = problem.inputs[:3], problem.targets[:3]
    figures = monitored(problem, SGD(problem.model.parameters(), lr=0.1), seconds=math.inf)
    assert math.isnan(figures["noise_scale"])
    assert math.isfinite(figures["sharpness"])


def test_weights_that_are_not_finite_give_nan_and_stop_nothing() -> None:
    problem = small()
    with torch.no_grad():
        next(iter(problem.model.parameters())).fill_(math.nan)
    figures = monitored(problem, SGD(problem.model.parameters(), lr=0.1))
    assert math.isnan(figures["sharpness"])
    assert math.isnan(figures["critical_rate"])
    assert figures["learning_rate"] == 0.1


def test_a_dict_batch_of_a_network_with_batch_normalisation_has_a_noise_scale() -> None:
    """The loss runs the model, whose batch statistics are other ones for every cut of the rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(256, 5)
    targets = inputs[:, 0].gt(0).long()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.1)
    batch = {"inputs": inputs, "labels": targets}
    found = hf.monitor(
        model, lambda net, b: loss_fn(net(b["inputs"]), b["labels"]), batch, optimizer
    )
    pair = hf.monitor(model, loss_fn, (inputs, targets), optimizer)
    assert 0 < found["noise_scale"] < math.inf
    assert found["noise_scale"] == pytest.approx(pair["noise_scale"], rel=1e-4)


def test_an_update_of_zero_has_no_sharpness() -> None:
    problem = small()
    figures = monitored(problem, hf.optim.Muon([problem.model[0].weight], lr=0.0))
    assert math.isnan(figures["sharpness"])
    assert figures["converged"] == 0


def test_mistakes_are_refused() -> None:
    problem = small()
    stranger = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(HessianFlowError, match="the SGD holds no trainable weight of the model"):
        monitored(problem, stranger)
    optimizer = SGD(problem.model.parameters(), lr=0.1)
    with pytest.raises(HessianFlowError, match="seconds must be positive, got 0"):
        monitored(problem, optimizer, seconds=0)
    with pytest.raises(HessianFlowError, match=r"must be a torch\.optim\.Optimizer, got a Linear"):
        hf.monitor(problem.model, problem.loss_fn, problem.pair, nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_loss_that_is_no_mean_over_examples_is_told() -> None:
    """A pair is (sum, count); with the mean in its place the noise scale sees a contradiction."""
    problem = small()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        return nn.functional.cross_entropy(outputs, targets), len(targets)

    optimizer = SGD(problem.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="hf.monitor leaves out the noise scale: the loss"):
        figures = hf.monitor(problem.model, loss, problem.pair, optimizer)
    assert math.isnan(figures["noise_scale"])
