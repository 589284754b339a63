"""What is no symmetric operator on vectors of one type is refused, and not answered with a
number."""

import pytest
import torch
from torch import Tensor, nn

from hessianflow import HessianFlowError
from hessianflow.curvature import CallableOperator, HessianOperator, top_eigenpairs


def of_matrix(matrix: Tensor) -> CallableOperator:
    return CallableOperator(lambda v: matrix @ v, len(matrix), matrix.dtype)


def random_matrix(size: int = 60) -> Tensor:
    return (
        torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        / size**0.5
    )


@pytest.mark.parametrize("k", [1, 3])
def test_refuses_a_matrix_that_is_not_symmetric(k):
    matrix = random_matrix()
    with pytest.raises(HessianFlowError, match="the operator is not symmetric"):
        top_eigenpairs(of_matrix(matrix), k, seed=0)
    symmetric = (matrix + matrix.T) / 2
    values = torch.linalg.eigvalsh(symmetric)
    expected = values[values.abs().argsort(descending=True)][:k]
    found = top_eigenpairs(of_matrix(symmetric), k, seed=0).values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_a_search_that_ends_early_says_nothing_of_a_symmetric_matrix():
    symmetric = random_matrix(200)
    result = top_eigenpairs(of_matrix(symmetric + symmetric.T), 5, max_matvecs=8, seed=0)
    assert not result.converged


class Product(nn.Module):
    """The product of its weights; torch's second derivative divides by each, and overflows beside a
    tiny one."""

    def __init__(self, smallest: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([smallest, 1.0, 1.0, 1.0], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weights.prod()


def test_refuses_a_second_derivative_that_has_lost_all_digits():
    inputs = torch.full((5, 1), 4000.0, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    # Entries (0, j) are 4000, all others 4000 times the smallest weight: the leading value is 4000
    # sqrt(3) beside 0.
    found = top_eigenpairs(HessianOperator(Product(0.0), loss, (inputs, inputs)), seed=0)
    assert found.values.abs().item() == pytest.approx(4000 * 3**0.5, rel=1e-3)
    with pytest.raises(HessianFlowError, match="second derivative"):
        top_eigenpairs(HessianOperator(Product(1e-40), loss, (inputs, inputs)), seed=0)


def test_deflation_refuses_columns_that_are_not_orthonormal():
    operator, axis = of_matrix(torch.diag(torch.arange(1.0, 5.0))), torch.eye(4)[:, 3:]
    assert top_eigenpairs(operator.deflated(axis), seed=0).values.item() == pytest.approx(
        3.0, rel=1e-3
    )
    with pytest.raises(HessianFlowError, match="vectors must be orthonormal columns"):
        operator.deflated(2 * axis)
    with pytest.raises(
        HessianFlowError, match=r"vectors must be torch.float32 on cpu, got torch.float64"
    ):
        operator.deflated(axis.double())


def test_a_sum_refuses_other_vectors():
    single, double = of_matrix(torch.eye(4)), of_matrix(torch.eye(4, dtype=torch.float64))
    with pytest.raises(HessianFlowError, match="one type and device"):
        single + double
    with pytest.raises(HessianFlowError, match=r"got int; for A \+ c I: A.shifted\(c\)"):
        single + 3


def test_a_function_must_return_its_type():
    with pytest.raises(
        HessianFlowError, match=r"matvec must return torch.float32, .* got torch.float64"
    ):
        top_eigenpairs(CallableOperator(lambda v: v.double(), 4))
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(HessianFlowError, match="dtype must be a floating-point type"):
            CallableOperator(lambda v: v, 4, dtype)
