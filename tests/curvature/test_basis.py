"""Rows in blocks against one matrix."""

import pytest
import torch

from hessianflow.curvature import CallableOperator
from hessianflow.curvature.basis import Rows


def rows_of(matrix: torch.Tensor, most: int) -> Rows:
    made = Rows(CallableOperator(lambda v: v, matrix.shape[1], dtype=matrix.dtype), most)
    for row in matrix:
        made.append(row)
    return made


@pytest.mark.parametrize("most", [1, 3, 8, 40], ids="rows a block {}".format)
def test_blocks_compute_what_one_matrix_does(most):
    torch.manual_seed(0)
    matrix = torch.randn(8, 50, dtype=torch.float64)
    rows = rows_of(matrix, most)
    vector, weights, several = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((50,), (8,), (3, 8))
    )
    assert rows.size == 8
    torch.testing.assert_close(rows.dot(vector), matrix @ vector)
    torch.testing.assert_close(rows.combine(weights), weights @ matrix)
    torch.testing.assert_close(rows.combine(several), several @ matrix)
    assert all(torch.equal(rows[i], matrix[i]) for i in range(8))


@pytest.mark.parametrize("most", [3, 40])
def test_replaced_rows_are_the_combinations_and_more_can_follow(most):
    torch.manual_seed(0)
    matrix, mix = torch.randn(7, 20, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    rows = rows_of(matrix, most)
    rows.replace(mix)
    rows.append(matrix[0])
    expected = torch.cat([mix @ matrix, matrix[:1]])
    assert rows.size == 5
    torch.testing.assert_close(rows.combine(torch.eye(5, dtype=torch.float64)), expected)


def test_no_rows_have_no_products_and_combine_to_nothing():
    rows = rows_of(torch.empty(0, 6), 4)
    assert rows.dot(torch.ones(6)).shape == (0,)
    assert torch.equal(rows.combine(torch.empty(0)), torch.zeros(6))


def test_rows_of_a_large_network_are_allocated_a_few_at_a_time():
    rows = Rows(CallableOperator(lambda v: v, 3_000_000), 40)
    rows.append(torch.ones(3_000_000))
    assert sum(block.numel() for block in rows._blocks) == 4 * 3_000_000
