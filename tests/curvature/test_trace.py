"""Trace, diagonal and Frobenius norm against exact values; errors in units of the standard error they claim."""

import pytest
import torch
from problems import clustered, operator_of, symmetric

from hessianflow.curvature import diagonal, frobenius_norm, trace
from hessianflow.interfaces import HessianFlowError

MATRIX = symmetric([50.0, -20.0, 15.0, *torch.linspace(-0.5, 1, 97).tolist()])
TRUTH = float(MATRIX.trace())


def runs(method, matrix=MATRIX, n=200, matvecs=24):
    operator = operator_of(matrix)
    return [trace(operator, num_matvecs=matvecs, method=method, seed=seed) for seed in range(n)]


@pytest.mark.parametrize("method", ["hutchinson", "hutchpp"])
def test_unbiased_and_the_standard_error_covers_as_often_as_it_says(method):
    results = runs(method)
    errors = torch.tensor([r.value - TRUTH for r in results])
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / len(errors) ** 0.5
    covered = torch.tensor([abs(r.value - TRUTH) <= 2 * r.stderr for r in results]).float().mean()
    # 95.4 % for many Gaussian samples, 91 % for the Student t of the 8 probes that Hutch++ has left; 4 sigma below.
    assert float(covered) > 0.83
    assert all(r.matvecs == 24 for r in results)


def test_outliers_make_hutchpp_far_more_accurate():
    plain, low_rank = (
        torch.tensor([r.value - TRUTH for r in runs(m, n=60)]).square().mean().sqrt() for m in ("hutchinson", "hutchpp")
    )
    assert low_rank < plain / 5


def test_a_flat_spectrum_costs_nothing():
    """Of a flat spectrum plain probes are best; the sketch is turned into such probes."""
    matrix = symmetric([1.0 if i % 2 else -1.0 for i in range(100)])
    plain, fallen_back = (
        torch.tensor([r.value for r in runs(m, matrix, 150)]).square().mean().sqrt() for m in ("hutchinson", "hutchpp")
    )
    assert fallen_back < 1.25 * plain  # two estimates of one number from 150 runs each: 8 % apart at one sigma


def test_exact_when_the_sketch_holds_everything():
    matrix = symmetric([3.0, -1.0, 2.0, 0.0])
    result = trace(operator_of(matrix), num_matvecs=12, seed=0)
    assert result.value == pytest.approx(4.0, abs=1e-12)
    assert result.stderr < 1e-12
    zero = trace(operator_of(torch.zeros(5, 5, dtype=torch.float64)), num_matvecs=6, seed=0)
    assert (zero.value, zero.stderr) == (0.0, 0.0)


def test_seeds_repeat_none_does_not_and_the_global_generator_stays():
    operator, state = operator_of(MATRIX), torch.get_rng_state()
    first, again, fresh, fresh2 = (trace(operator, num_matvecs=6, seed=s).value for s in (1, 1, None, None))
    assert first == again
    assert len({first, fresh, fresh2}) == 3
    assert torch.equal(state, torch.get_rng_state())


def test_diagonal_within_its_standard_errors():
    result = diagonal(operator_of(MATRIX), num_matvecs=400, seed=0)
    scores = (result.values - MATRIX.diagonal()) / result.stderr
    assert result.matvecs == 400
    assert 0.7 < float(scores.std()) < 1.3
    exact = diagonal(operator_of(torch.diag(torch.arange(5.0))), num_matvecs=3, seed=0)
    assert exact.values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert exact.stderr.max() == 0


def test_frobenius_norm():
    result = frobenius_norm(operator_of(MATRIX), num_matvecs=300, seed=0)
    assert abs(result.value - float(MATRIX.norm())) < 4 * result.stderr
    assert frobenius_norm(operator_of(torch.zeros(3, 3)), num_matvecs=2, seed=0).value == 0


def test_bad_arguments_are_refused():
    operator = operator_of(symmetric(clustered()))
    with pytest.raises(HessianFlowError, match="method must be one of hutchpp, hutchinson, got 'xtrace'"):
        trace(operator, num_matvecs=9, method="xtrace")
    with pytest.raises(HessianFlowError, match="num_matvecs must be at least 6 for hutchpp, got 5"):
        trace(operator, num_matvecs=5)
    with pytest.raises(HessianFlowError, match="num_matvecs must be at least 2 for hutchinson, got 1"):
        trace(operator, num_matvecs=1, method="hutchinson")
    with pytest.raises(HessianFlowError, match="num_matvecs must be at least 2, got 1"):
        diagonal(operator, num_matvecs=1)
    with pytest.raises(HessianFlowError, match="num_matvecs must be at least 2, got 1"):
        frobenius_norm(operator, num_matvecs=1)
