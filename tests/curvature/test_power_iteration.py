"""Power iteration against the worked numbers of the ABSA reference and prescribed spectra."""

import pytest
import torch
from problems import clustered, operator_of, symmetric

from hessianflow.curvature import top_eigenpairs
from hessianflow.curvature.power_iteration import power_iteration


def test_rayleigh_quotients_of_the_worked_example():
    """H = diag(4, 1) from (1, 1)/sqrt 2 gives 5/2, 65/17, 1025/257, 16385/4097 in exact
    arithmetic."""
    operator = operator_of(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    start = torch.ones(2, 1, dtype=torch.float64)
    options = {"which": "LM", "tol": 1e-2, "max_matvecs": 4, "start": start}
    result = power_iteration(operator, 1, **options)
    assert result.history == pytest.approx([5 / 2, 65 / 17, 1025 / 257, 16385 / 4097], abs=1e-12)
    assert result.matvecs == 4
    # the newest value, not the one before it
    assert result.values.item() == pytest.approx(16385 / 4097)


def test_a_value_that_hardly_changes_is_not_called_converged_when_the_residual_is_large():
    """Two values 1 % apart: the quotient creeps, its change is below the tolerance, the vector is
    still a mixture."""
    matrix = symmetric([1.0, 0.99, *[0.1] * 10])
    start = torch.linalg.eigh(matrix).eigenvectors[:, -2:].sum(dim=1, keepdim=True)
    options = {"which": "LM", "tol": 1e-3, "max_matvecs": 4, "start": start}
    result = power_iteration(operator_of(matrix), 1, **options)
    before, last = result.history[-2:]
    assert abs(last - before) < 1e-3 * before
    assert not result.converged


@pytest.mark.parametrize(
    ("which", "expected"), [("LM", [10, 6, 5.9]), ("LA", [10, 6, 5.9]), ("SA", [-3, -0.1])]
)
def test_deflated_pairs_and_both_ends(which, expected):
    """The values are those of the matrix, although SA and LA iterate on a shifted one."""
    matrix = symmetric(clustered())
    k = len(expected)
    result = top_eigenpairs(
        operator_of(matrix), k, method="power", which=which, tol=1e-3, max_matvecs=4000, seed=0
    )
    assert result.values == pytest.approx(expected, abs=1e-2)
    residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    torch.testing.assert_close(residuals, result.residuals, rtol=1e-6, atol=1e-12)


def test_the_sign_of_a_dominant_negative_value_is_kept():
    operator = operator_of(torch.diag(torch.tensor([-3.0, 1.0], dtype=torch.float64)))
    assert top_eigenpairs(operator, method="power", seed=0).values.item() == pytest.approx(-3.0)


def test_a_tie_of_signs_is_reported_as_not_converged():
    operator = operator_of(symmetric([3.0, -3.0, 1.0]))
    assert not top_eigenpairs(operator, method="power", max_matvecs=300, seed=0).converged


def test_zero_matrix():
    result = top_eigenpairs(
        operator_of(torch.zeros(3, 3, dtype=torch.float64)), 2, method="power", seed=0
    )
    assert result.values.tolist() == [0.0, 0.0]
    assert result.converged
