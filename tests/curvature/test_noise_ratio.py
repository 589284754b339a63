"""Noise over signal from vectors with a known law: unbiased, with errors that cover as they say."""

import math

import pytest
import torch
from problems import symmetric

from hessianflow.curvature.noise_parts import _products
from hessianflow.curvature.noise_ratio import _estimate

SIZE = 12
HESSIAN = symmetric([12.0, 8.0, 5.0, -1.0, *torch.linspace(0.1, 1, SIZE - 4).tolist()])
ROOT = symmetric(torch.linspace(0.2, 2, SIZE).tolist(), seed=1)
MEAN = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
FACTORS = torch.linspace(0.1, 3, SIZE, dtype=torch.float64)
SIMPLE = pytest.mark.parametrize("simple", [False, True], ids=["with H", "simple"])
GEOMETRY = pytest.mark.parametrize("factors", [None, FACTORS], ids=["gradient", "update"])


def drawn(seed, parts, examples, factors=None, mean=MEAN, spread=0.5):
    """Mean updates of parts of unequal size, and Hessians that differ from part to part."""
    source = torch.Generator().manual_seed(seed)
    low, high = examples // 2, examples + examples // 2
    weights = torch.randint(low, high, (parts,), generator=source).double()
    noise = torch.randn(parts, SIZE, generator=source, dtype=torch.float64) @ ROOT
    updates = mean + noise / weights.sqrt()[:, None]
    bent = spread * torch.randn(parts, SIZE, generator=source, dtype=torch.float64)
    hessians = HESSIAN + torch.diag_embed(bent)
    if factors is not None:
        updates = updates * factors
    return updates, hessians, weights


def ratio_of(updates, hessians, weights, simple):
    """The estimate, the mean over the other parts taken anew for each."""
    same = torch.eye(len(weights), dtype=torch.bool)

    def means(kept):
        return (kept * weights) @ updates / (kept * weights).sum(1, keepdim=True)

    mean = means(~same)
    deviation = updates.roll(1, 0) - means(~same & ~same.roll(1, 0))
    bent = torch.einsum("kij,kj->ki", hessians, deviation)
    signal = torch.einsum("ki,kij,kj->k", mean, hessians, mean)
    whole = weights @ updates / weights.sum()
    apart = updates - mean
    square = updates.square().sum(1)
    of_parts = [(deviation * bent).sum(1), (mean * bent).sum(1), signal, apart.square().sum(1)]
    numbers = torch.stack([*of_parts, apart @ whole, square, square], 1)
    return _products(numbers, weights, float(whole @ whole))[simple].ratio(1.0)


def truth(simple, factors=None, mean=MEAN):
    hessian = torch.eye(SIZE, dtype=torch.float64) if simple else HESSIAN
    scale = torch.ones(SIZE, dtype=torch.float64) if factors is None else factors
    root = ROOT * scale
    signal = (scale * mean) @ hessian @ (scale * mean)
    return float((hessian @ root.T @ root).trace()), float(signal)


def estimates(simple, seeds, parts, examples, factors=None, mean=MEAN):
    return [ratio_of(*drawn(seed, parts, examples, factors, mean), simple) for seed in range(seeds)]


@SIMPLE
@GEOMETRY
@pytest.mark.parametrize(("parts", "examples"), [(5, 6), (16, 64)])
def test_numerator_and_denominator_are_unbiased(parts, examples, factors, simple):
    noise, signal = truth(simple, factors)
    found = estimates(simple, 300, parts, examples, factors)
    for values, exact in (
        ([one.numerator for one in found], noise),
        ([one.denominator for one in found], signal),
    ):
        sample = torch.tensor(values, dtype=torch.float64)
        assert abs(float(sample.mean()) - exact) < 4 * float(sample.std()) / len(found) ** 0.5


def test_the_product_of_one_mean_gradient_with_itself_would_be_biased():
    """The oracle of the test above: g.Hg without what the noise adds to it."""
    faint = MEAN / 3
    _, signal = truth(False, mean=faint)
    values = []
    for seed in range(300):
        updates, hessians, weights = drawn(seed, 5, 6, mean=faint)
        mean = weights @ updates / weights.sum()
        values.append(float(mean @ hessians.mean(0) @ mean))
    sample = torch.tensor(values)
    assert float(sample.mean()) - signal > 4 * float(sample.std()) / len(values) ** 0.5


@SIMPLE
@GEOMETRY
@pytest.mark.parametrize("examples", [40, 800], ids=["noisy", "clear"])
def test_two_standard_errors_cover_as_often_as_they_say(examples, factors, simple):
    noise, signal = truth(simple, factors)
    found = estimates(simple, 400, 24, examples, factors)
    covered = {
        "numerator": [abs(e.numerator - noise) <= 2 * e.numerator_stderr for e in found],
        "denominator": [abs(e.denominator - signal) <= 2 * e.denominator_stderr for e in found],
        "ratio": [abs(e.value - noise / signal) <= 2 * e.stderr for e in found],
        "limits": [e.low <= noise / signal <= e.high for e in found],
    }
    assert all(e.is_known for e in found)
    for name, hits in covered.items():
        share = sum(hits) / len(hits)
        assert 0.88 <= share <= 0.99, (name, share)


def test_limits_cover_where_the_signal_drowns_and_the_value_is_left_open():
    faint = MEAN / 12
    noise, signal = truth(False, mean=faint)
    found = estimates(False, 300, 16, 20, mean=faint)
    open_ones = [e for e in found if not e.is_known]
    assert len(open_ones) > 200
    assert all(e.value == math.inf and "not surely positive" in e.reason for e in open_ones)
    assert all(e.high == math.inf for e in open_ones)
    assert sum(e.low <= noise / signal <= e.high for e in found) / len(found) > 0.9
    # The lower limit says something: most exclude a tenth of the truth.
    assert sum(e.low > noise / signal / 10 for e in found) / len(found) > 0.5


def test_a_unit_of_weight_that_holds_several_examples_scales_noise_and_ratio():
    products = _products(torch.rand(6, 7).double()[:, [0, 1, 2, 3, 4, 5, 5]], torch.ones(6), 1.0)
    one, three = (products[0].ratio(scale) for scale in (1.0, 3.0))
    assert three.numerator == pytest.approx(3 * one.numerator)
    assert three.denominator == pytest.approx(one.denominator)
    assert three.low == pytest.approx(3 * one.low)


def ratio(noise, signal, spread=0.01):
    """An estimate whose parts scatter by `spread` around these numbers."""
    swing = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64) * spread
    return _estimate(torch.tensor([noise, signal]).double(), torch.stack([swing, -swing]))


def test_a_signal_that_is_surely_negative_leaves_no_ratio():
    found = ratio(3.0, -1.0)
    assert not found.is_known
    assert (found.value, found.low, found.high) == (math.inf, 0.0, math.inf)


def test_noise_along_which_the_loss_falls_needs_no_examples():
    found = ratio(-3.0, 1.0)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.reason.startswith("the noise -3")


def test_two_sure_numbers_have_their_ratio_within_close_limits():
    found = ratio(3.0, 2.0)
    assert found.is_known
    assert found.value == 1.5
    assert 1.48 < found.low < 1.5 < found.high < 1.52
    assert found.to_dict()["value"] == 1.5
