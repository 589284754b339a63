"""Random vectors have one width wherever they are drawn, and flat vectors map back to
parameters."""

import math

import pytest
import torch
from problems import mlp, operator_of, symmetric

from hessianflow.curvature.vectors import (
    flatten,
    gaussian,
    generator,
    normalised,
    rademacher,
    unflatten,
)

OPERATOR = operator_of(torch.zeros(2000, 2000, dtype=torch.float64))


@pytest.mark.parametrize("columns", [None, 3])
def test_gaussian_entries_have_unit_variance_on_every_path(columns):
    drawn = gaussian(OPERATOR, generator(0, OPERATOR.device), columns)
    assert drawn.shape == ((2000,) if columns is None else (2000, 3))
    assert drawn.dtype == torch.float64
    # the variance of n normal entries has a standard error of sqrt(2 / n)
    assert abs(float(drawn.var()) - 1) < 4 * (2 / drawn.numel()) ** 0.5
    assert abs(float(drawn.mean())) < 4 / drawn.numel() ** 0.5


def test_rademacher_entries_are_fair_signs():
    drawn = rademacher(OPERATOR, generator(0, OPERATOR.device), 5)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 4 / drawn.numel() ** 0.5


def test_a_seed_repeats_and_none_is_fresh():
    small = operator_of(symmetric(range(5)))
    first, again, fresh, fresh2 = (
        gaussian(small, generator(seed, small.device)) for seed in (3, 3, None, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(fresh, fresh2)


def test_flatten_and_unflatten_are_inverse():
    parameters = list(mlp((5, 6, 4)).parameters())
    flat = flatten(parameters, parameters, torch.float64)
    assert all(
        torch.equal(a, b) for a, b in zip(unflatten(flat, parameters), parameters, strict=True)
    )
    gaps = flatten([None, *parameters[1:]], parameters, torch.float32)
    assert gaps.dtype == torch.float32
    assert gaps[:30].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_vectors_of_any_size_are_normalised_to_the_same_bits(shape, dtype):
    limits = torch.finfo(dtype)
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    unit = plain / plain.norm(dim=0)
    most, least = math.frexp(limits.max)[1] - 4, math.frexp(limits.tiny)[1] + 40
    for exponent in (0, most, least):  # powers of two change no bit
        assert torch.equal(normalised(plain * 2.0**exponent), unit)
    largest = torch.full(shape, limits.max, dtype=dtype)
    assert normalised(largest).norm(dim=0) == pytest.approx(1.0)  # its norm is beyond the type
    assert normalised(torch.zeros(shape, dtype=dtype)).abs().max() == 0
    smallest = torch.zeros(shape, dtype=dtype)
    smallest[3] = limits.smallest_normal / 2**10
    assert normalised(smallest)[3].min() == 1
