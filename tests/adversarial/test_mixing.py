"""Which rows are perturbed: against counts worked by hand and the defining condition in exact
rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessianflow.adversarial import perturbed_rows


@pytest.mark.parametrize(("halvings", "count"), list(enumerate([25, 12, 6, 3, 1, 0])))
def test_counts_of_absa(halvings, count):
    """25, 12, 6, 3, 1, 0 of 128 as the share is halved at every growth (reference, pitfalls)."""
    assert len(perturbed_rows(128, 0.2 / 2**halvings)) == count


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 1000), st.integers(0, 1000))
def test_rows_satisfy_the_definition(batch_size, denominator, numerator):
    """Row i is chosen iff floor((i+1) s) > floor(i s), evaluated with exact fractions row by
    row."""
    share = Fraction(min(numerator, denominator), denominator)
    expected = [i for i in range(batch_size) if int((i + 1) * share) > int(i * share)]
    assert perturbed_rows(batch_size, float(share)).tolist() == expected


@pytest.mark.parametrize(
    ("batch_size", "share", "count"), [(100, 0.29, 29), (10, 0.7, 7), (100, 0.07, 7), (5, 0.2, 1)]
)
def test_floating_point_does_not_lose_a_row(batch_size, share, count):
    """100 * 0.29 is 28.999999999999996 in double precision; 29 rows are meant."""
    assert len(perturbed_rows(batch_size, share)) == count


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 64), st.floats(0, 1))
def test_every_cut_keeps_the_mix(microbatch_size, share):
    """In each microbatch the number of perturbed rows differs from its share by less than one."""
    rows = perturbed_rows(256, share)
    for start in range(0, 256, microbatch_size):
        stop = min(start + microbatch_size, 256)
        inside = int(((rows >= start) & (rows < stop)).sum())
        assert abs(inside - (stop - start) * share) < 1 + 1e-3


def test_all_and_none():
    assert perturbed_rows(7, 1.0).tolist() == list(range(7))
    assert perturbed_rows(7, 0.0).dtype == torch.int64
    assert len(perturbed_rows(7, 0.0)) == 0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_share_outside_the_unit_interval_is_refused(share):
    with pytest.raises(ValueError, match=r"adversarial share must lie in \[0, 1\], got"):
        perturbed_rows(8, share)
