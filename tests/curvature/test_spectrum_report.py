"""The report behind `hessianflow spectrum`: each figure against the dense matrix; plain JSON;
progress told."""

import json

import pytest
import torch
from problems import classification, dense_hessian, mlp, train

from hessianflow.curvature import spectrum_report
from hessianflow.interfaces import HessianFlowError


@pytest.fixture(scope="module")
def measured():
    problem = classification(mlp((5, 6, 4)), (5,), 30, 4)
    train(problem, 10)
    told = []
    report = spectrum_report(
        problem.model,
        problem.loss_fn,
        problem.pair,
        k=3,
        density=True,
        trace=True,
        layers="*",
        progress=lambda stage, done: told.append((stage, done)),
    )
    return problem, dense_hessian(problem), report, told


def test_figures_match_the_dense_matrix(measured):
    _, matrix, report, _ = measured
    values = torch.linalg.eigvalsh(matrix)
    leading = values[values.abs().argsort(descending=True)][:3]
    torch.testing.assert_close(report.eigen.values, leading, rtol=1e-3, atol=0)
    assert abs(report.trace.value - float(matrix.trace())) <= 5 * report.trace.stderr + 1e-9
    assert (report.size, report.num_examples) == (64, 30)
    assert report.gradient_overlap.shape == (3,)


def test_shares_by_sign_cover_the_dense_ones(measured):
    _, matrix, report, _ = measured
    values, shares = torch.linalg.eigvalsh(matrix), report.to_dict()["density"]["shares"]
    # Of a softmax the last layer has directions without curvature: 7 of 64 eigenvalues.
    parts = {"negative": values < -1e-9, "zero": values.abs() <= 1e-9, "positive": values > 1e-9}
    assert int(parts["zero"].sum()) == 7
    for name, part in parts.items():
        assert shares[name]["low"] <= float(part.double().mean()) <= shares[name]["high"]


def test_layers_are_diagonal_blocks(measured):
    _, matrix, report, _ = measured
    assert [(layer.name, layer.size) for layer in report.layers] == [("0", 36), ("2", 28)]
    for layer, block in zip(report.layers, (matrix[:36, :36], matrix[36:, 36:]), strict=True):
        values = torch.linalg.eigvalsh(block)
        assert layer.eigenvalue == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
        assert abs(layer.trace - float(block.trace())) <= 6 * layer.trace_stderr + 1e-9
        assert layer.converged


def test_it_is_plain_json(measured):
    _, _, report, _ = measured
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(record["density"]["nodes"]) == 3
    assert 0 <= record["density"]["negative_mass"] <= 1
    shares = record["density"]["shares"]
    assert sum(share["value"] for share in shares.values()) == pytest.approx(1.0)
    assert set(shares) == {"negative", "zero", "positive"}
    assert record["norm_mode"] == "eval"


def test_every_product_is_told(measured):
    _, _, report, told = measured
    counts = {stage: max(done for s, done in told if s == stage) for stage, _ in told}
    assert counts["eigenvalues"] + counts["trace"] + counts["density"] == report.matvecs
    assert set(counts) == {"eigenvalues", "trace", "density", "0", "2"}


def test_only_what_is_asked_for():
    problem = classification(mlp((5, 6, 4)), (5,), 30, 4)
    report = spectrum_report(problem.model, problem.loss_fn, problem.pair, k=1)
    assert (report.trace, report.density, report.layers) == (None, None, ())
    assert report.matvecs == report.eigen.matvecs


def test_a_pattern_without_a_module_is_refused():
    problem = classification(mlp((5, 6, 4)), (5,), 30, 4)
    with pytest.raises(
        HessianFlowError,
        match="layers: no module with trainable weights matches 'conv'; names are like 0, 2",
    ):
        spectrum_report(problem.model, problem.loss_fn, problem.pair, layers="conv")
