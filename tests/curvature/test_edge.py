"""The probe of an optimizer: the sharpness that its steps meet, and the share of the edge used."""

import math
from typing import Any

import pytest
import torch
from problems import classification, dense_hessian, mlp, train
from torch import Tensor, nn
from torch.optim import SGD, Adam

from hessianflow.control import CriticalBatch, replay
from hessianflow.curvature import CurvatureProbe, HessianOperator, critical_rate, optimizer_geometry
from hessianflow.distributed import sharded
from hessianflow.interfaces import CurvatureReading, Progress
from hessianflow.training.world import LocalWorld


def small(seed: int = 0) -> Any:
    problem = classification(mlp((5, 8, 4), seed), (5,), 64, 4)
    train(problem, 5)
    return problem


def stepped(problem: Any, optimizer: Any, steps: int = 1) -> Any:
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss_fn(problem.model(problem.inputs), problem.targets).backward()
        optimizer.step()
    return optimizer


def probe_of(problem: Any, optimizer: Any, **options: Any) -> CurvatureProbe:
    return CurvatureProbe(
        problem.model, problem.loss_fn, problem.pair, optimizer=optimizer, tol=1e-5, **options
    )


def test_for_sgd_it_is_the_largest_eigenvalue_and_its_share() -> None:
    problem = small()
    optimizer = SGD(problem.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    probe = probe_of(problem, optimizer)
    reading = probe()
    truth = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    assert reading.eigenvalue == pytest.approx(truth, rel=1e-5)
    assert reading.matrix == "Hessian"
    assert reading.details["sharpness"] == pytest.approx(truth + 0.3, rel=1e-5)
    assert reading.details["threshold"] == pytest.approx(3.8)
    assert reading.details["edge_share"] == pytest.approx(0.05 * (truth + 0.3) / 3.8, rel=1e-5)
    assert probe.note == ""


def test_for_adam_it_is_that_of_the_preconditioned_hessian() -> None:
    problem = small()
    optimizer = stepped(problem, Adam(problem.model.parameters(), lr=0.01))
    reading = probe_of(problem, optimizer)()
    geometry = optimizer_geometry(optimizer)
    diagonal = torch.cat([geometry.preconditioner(p) for p in problem.model.parameters()])  # type: ignore[misc]
    values = torch.linalg.eigvals(dense_hessian(problem) / diagonal[:, None]).real
    assert reading.eigenvalue == pytest.approx(float(values.max()), rel=1e-4)
    assert reading.matrix == "preconditioned Hessian"
    assert reading.details["edge_share"] == pytest.approx(0.01 * float(values.max()) / 38, rel=1e-4)


class Saddle(nn.Module):
    """The loss (w1^2 - 3 w2^2) / 2, whose Hessian leads with a negative eigenvalue."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(self, inputs: Tensor) -> Tensor:
        value = (self.weight[0] ** 2 - 3 * self.weight[1] ** 2) / 2
        return value.expand(len(inputs))


def first(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets
    return outputs.mean()


SADDLE = torch.zeros(2, 1), torch.zeros(2)


def test_a_leading_negative_eigenvalue_is_passed_by() -> None:
    model = Saddle()
    assert CurvatureProbe(model, first, SADDLE)().eigenvalue == pytest.approx(-3)
    optimizer = SGD(model.parameters(), lr=0.1)
    reading = CurvatureProbe(model, first, SADDLE, optimizer=optimizer)()
    assert reading.eigenvalue == pytest.approx(1)
    assert reading.converged
    told = CurvatureProbe(model, first, SADDLE, optimizer=optimizer, which="LM")()
    assert told.eigenvalue == pytest.approx(-3)


def test_without_a_preconditioner_it_is_the_curvature_along_the_update() -> None:
    problem = small()
    optimizer = Adam(problem.model.parameters(), lr=0.01)  # has not stepped
    probe = probe_of(problem, optimizer)
    reading = probe()
    found = critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer)
    assert reading.details["sharpness"] == pytest.approx(2 / found.critical)
    assert reading.details["threshold"] == 2
    assert reading.details["edge_share"] == pytest.approx(0.01 / found.critical)
    truth = float(torch.linalg.eigvalsh(dense_hessian(problem))[-1])
    assert reading.eigenvalue == pytest.approx(truth, rel=1e-5)
    assert "has not stepped" in probe.note
    spared = probe_of(problem, SGD(problem.model.parameters(), lr=0.01))()
    assert reading.matvecs == spared.matvecs + 1
    stepped(problem, optimizer)
    assert probe().details["threshold"] == pytest.approx(38)
    assert probe.note == ""


def test_an_optimizer_that_cannot_be_stepped_leaves_the_eigenvalue() -> None:
    problem = small()
    probe = probe_of(problem, torch.optim.LBFGS(problem.model.parameters()))
    reading = probe()
    assert reading.converged
    assert reading.details == {}
    assert "computes gradients within its step" in probe.note


def test_ranks_measure_the_same_share() -> None:
    problem = small()
    for optimizer in (
        SGD(problem.model.parameters(), lr=0.05),
        Adam(problem.model.parameters(), lr=0.01),
    ):
        whole = probe_of(problem, optimizer)()
        rank = probe_of(problem, optimizer, operator=sharded(LocalWorld()))()
        for name, figure in whole.details.items():
            assert rank.details[name] == pytest.approx(figure, rel=1e-6)


def test_weights_that_are_not_finite_read_nan() -> None:
    problem = small()
    optimizer = SGD(problem.model.parameters(), lr=0.05)
    with torch.no_grad():
        next(iter(problem.model.parameters())).fill_(math.nan)
    reading = probe_of(problem, optimizer)()
    assert math.isnan(reading.eigenvalue)
    assert reading.details == {}


def test_moments_that_are_not_finite_read_nan() -> None:
    problem = small()
    optimizer = stepped(problem, Adam(problem.model.parameters(), lr=0.01))
    optimizer.state[next(iter(problem.model.parameters()))]["exp_avg_sq"].fill_(math.nan)
    assert math.isnan(probe_of(problem, optimizer)().eigenvalue)


def test_the_gradient_of_a_kept_graph_is_the_gradient() -> None:
    problem = small()
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    torch.testing.assert_close(operator.kept_gradient(), operator.gradient())
    cut = HessianOperator(problem.model, problem.loss_fn, problem.pair, microbatch_size=7)
    torch.testing.assert_close(cut.kept_gradient(), operator.gradient())


def decided(**details: float) -> Any:
    controller = CriticalBatch(128, 1024, momentum=0.9, loss_power=None)
    reading = CurvatureReading(10.0, 0.0, 5, True, details=details)
    signals = {"learning_rate": 0.02}
    return controller.update(Progress(1, 4096, 32, 4096, 10), reading, signals)


def test_the_controller_takes_the_threshold_of_the_optimizer() -> None:
    plain = decided()
    assert decided(threshold=2 * (1 + 0.9), sharpness=10.0) == plain
    assert "stable up to a rate of 0.38" in plain.reason
    # 0.75 * threshold / sharpness / 0.02 = 0.75 * 38 / 1000 / 0.02 = 1.425
    adam = decided(threshold=38.0, sharpness=1000.0)
    assert adam.batch_size == round(128 * 1.425)
    assert "stable up to a rate of 0.038" in adam.reason
    along = decided(threshold=2.0, sharpness=50.0, edge_share=0.5)
    assert along.batch_size == 192


def test_a_replay_decides_by_the_recorded_threshold() -> None:
    place = {"epoch": 1, "examples": 4096}
    rows = [
        {"kind": "curvature", **place, "eigenvalue": 10.0, "sharpness": 1000.0, "threshold": 38.0},
        {"kind": "epoch", **place, "lr": 0.02, "train_loss": 1.0, "lr_factor": 1.0},
    ]
    controller = CriticalBatch(128, 1024, momentum=0.9, loss_power=None)
    result = replay(rows, controller, total_epochs=5)
    assert result.steps[0].decision.batch_size == round(128 * 1.425)


def test_adam_trains_at_the_edge_of_its_own_geometry() -> None:
    """Cohen et al., arXiv:2207.14484: in full-batch training the preconditioned sharpness rises to
    the threshold over the rate and stays there. The mean of four readings; each is within a fifth.
    """
    source = torch.Generator().manual_seed(0)
    inputs = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    noise = torch.sign(torch.randn(40, 1, generator=source, dtype=torch.float64))
    targets = torch.sin(6 * inputs) + 0.3 * noise
    model = mlp((1, 32, 32, 1))
    optimizer = Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99))
    probe = CurvatureProbe(
        model, nn.MSELoss(), (inputs, targets), optimizer=optimizer, check_product=False
    )
    shares = []
    for step in range(1, 901):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        if step == 5 or (step >= 600 and step % 100 == 0):
            shares.append(probe().details["edge_share"])
    assert shares[0] < 0.8  # it was not there from the start
    assert all(0.8 < share < 1.2 for share in shares[1:]), shares
