"""PyHessian beside us: they agree, its failures are reported, and its side effects do not reach the
model."""

import copy
import json
import sys

import pytest
import torch
from problems import classification, conv_net, mlp, train
from torch import nn

from hessianflow.curvature import Comparison, SecondOpinion, second_opinion
from hessianflow.interfaces import HessianFlowError

pytest.importorskip("pyhessian")


@pytest.fixture(scope="module")
def compared():
    problem = classification(conv_net(dtype=torch.float32), (1, 8, 8), 32)
    train(problem, 20)
    problem.model[0].weight.grad = torch.ones_like(problem.model[0].weight)
    before, rng = copy.deepcopy(problem.model), torch.get_rng_state()
    opinion = second_opinion(problem.model, problem.loss_fn, problem.pair, k=2, num_matvecs=60)
    return problem, before, rng, opinion


def test_the_two_libraries_agree(compared):
    *_, opinion = compared
    rows = {row.quantity: row for row in opinion.rows}
    assert rows["eigenvalue 1"].difference < 2e-2  # PyHessian stops by the change of the value
    # two independent estimates of one trace, 60 products each
    assert abs(rows["trace"].ours - rows["trace"].theirs) < 10 * rows[
        "trace"
    ].ours_error + 0.5 * abs(rows["trace"].ours)
    assert opinion.num_examples == 32


def test_the_missing_density_is_reported_not_raised(compared):
    *_, opinion = compared
    assert opinion.rows[-1].quantity.startswith("density mean")
    assert opinion.rows[-1].difference is not None
    if opinion.rows[-1].quantity.endswith("*"):
        assert any("density() failed" in note for note in opinion.notes)


def test_the_model_is_as_found(compared):
    problem, before, rng, _ = compared
    assert [m.training for m in problem.model.modules()] == [m.training for m in before.modules()]
    state = problem.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    assert torch.equal(problem.model[0].weight.grad, torch.ones_like(problem.model[0].weight))
    assert all(p.grad is None for p in list(problem.model.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), rng)


def test_table_and_json(compared):
    *_, opinion = compared
    table = opinion.table()
    assert "hessianflow" in table.splitlines()[0]
    assert "eigenvalue 2" in table
    assert len(json.loads(json.dumps(opinion.to_dict()))["rows"]) == 4


def test_the_table_has_one_kind_of_difference():
    """Shares of the larger value; the densities' distance has the unit of an eigenvalue, and a line
    of its own."""
    rows = (
        Comparison("eigenvalue 1", 4.0, 1e-3, 5.0, 0.2),
        Comparison("trace", 0.0, 0.5, 0.0, 0.0),
        Comparison("density mean*", 1e-5, float("nan"), 5e-6, 2e-3),
        Comparison("trace", 1.0, 0.5, None, None),
    )
    lines = SecondOpinion(rows, ("a finding",), 8).table().splitlines()
    assert [line.split()[-4:] for line in lines[1:5]] == [
        ["4", "1.0e-03", "5", "2.00e-01"],
        ["0", "5.0e-01", "0", "0.00e+00"],
        ["1e-05", "-", "5e-06", "5.00e-01"],
        ["1", "5.0e-01", "failed", "-"],
    ]
    assert "difference: relative to the larger value" in lines[5]
    assert lines[6].startswith(
        "note: the densities, of one probe each, lie 2.00e-03 apart (Wasserstein distance"
    )
    assert lines[7:] == ["note: a finding"]


def test_what_pyhessian_cannot_do_is_a_note():
    """It raises on a parameter that the loss does not use."""
    problem = classification(mlp((5, 6, 4), dtype=torch.float32), (5,), 20, 4)
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    opinion = second_opinion(problem.model, problem.loss_fn, problem.pair)
    assert opinion.rows[0].theirs is None
    assert "failed" in opinion.table()
    assert len(opinion.notes) >= 2


def test_bad_input_and_a_missing_library(monkeypatch):
    problem = classification(mlp((5, 6, 4), dtype=torch.float32), (5,), 20, 4)
    with pytest.raises(
        HessianFlowError, match=r"batch must be one pair \(inputs, targets\) of tensors"
    ):
        second_opinion(problem.model, problem.loss_fn, {"x": problem.inputs})
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(
        HessianFlowError, match=r"PyHessian cannot be imported .*; pip install pyhessian"
    ):
        second_opinion(problem.model, problem.loss_fn, problem.pair)
