"""Operator algebra against the dense matrices it stands for."""

import numpy as np
import pytest
import torch
from problems import clustered, operator_of, symmetric

from hessianflow.curvature import CallableOperator
from hessianflow.interfaces import HessianFlowError

A, B = symmetric(clustered(12), seed=0), symmetric(range(12), seed=1)
V = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_algebra_matches_dense_matrices():
    a, b = operator_of(A), operator_of(B)
    expected = {
        "sum": (a + b, A + B),
        "difference": (a - b, A - B),
        "scale": (2.5 * a, 2.5 * A),
        "negative": (-a, -A),
        "shift": (a.shifted(-3.0), A - 3 * torch.eye(12, dtype=torch.float64)),
    }
    for name, (operator, matrix) in expected.items():
        torch.testing.assert_close(operator @ V, matrix @ V, msg=name)
        torch.testing.assert_close(operator.dense(), matrix, msg=name)


def test_deflation_removes_directions_on_both_sides():
    vectors = torch.linalg.eigh(A).eigenvectors[:, -2:]
    project = torch.eye(12, dtype=torch.float64) - vectors @ vectors.T
    deflated = operator_of(A).deflated(vectors)
    torch.testing.assert_close(deflated.dense(), project @ A @ project)
    assert (deflated @ vectors).abs().max() < 1e-14


def test_products_with_matrices_go_column_by_column():
    torch.testing.assert_close(operator_of(A) @ B, A @ B)
    assert (operator_of(A) @ B[:, :0]).shape == (12, 0)


def test_scipy_adapter_solves_with_eigsh():
    from scipy.sparse.linalg import eigsh

    values = eigsh(operator_of(A).to_scipy(), k=3, which="LM", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(values), [5.9, 6.0, 10.0], atol=1e-10)


def test_the_vector_is_not_changed():
    before = V.clone()
    (operator_of(A) + operator_of(B).shifted(1.0)) @ V
    assert torch.equal(V, before)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(11, dtype=torch.float64), r"vector must have shape \[12\], got \[11\]"),
        (torch.ones(12), r"vector must be torch.float64, got torch.float32"),
        (torch.ones(12, dtype=torch.float64, device="meta"), "vector must be on cpu, got meta"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(vector, message):
    with pytest.raises(HessianFlowError, match=message):
        operator_of(A) @ vector


def test_bad_construction_is_refused():
    with pytest.raises(HessianFlowError, match="size must be at least 1, got 0"):
        CallableOperator(lambda v: v, 0)
    with pytest.raises(HessianFlowError, match=r"matvec must return shape \[4\], got \[2\]"):
        CallableOperator(lambda v: v[:2], 4) @ torch.ones(4)
    with pytest.raises(HessianFlowError, match="one size, got 12 and 4"):
        operator_of(A) + CallableOperator(lambda v: v, 4)
    with pytest.raises(HessianFlowError, match=r"vectors must have shape \[12, m\], got \[3, 1\]"):
        operator_of(A).deflated(torch.ones(3, 1))
