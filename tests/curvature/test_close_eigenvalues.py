"""`converged` and error bounds where values lie close together, at both ends, or far below the
largest.

The oracle is the diagonal itself, or numpy's dense eigenvalues: no code of ours.
"""

import numpy as np
import pytest
import torch
from problems import operator_of, symmetric

from hessianflow.curvature import CallableOperator, HessianOperator, top_eigenpairs
from hessianflow.curvature.probe import CurvatureProbe
from hessianflow.interfaces import HessianFlowError

BULK = torch.linspace(-0.1, 0.5, 298, dtype=torch.float64)


def diagonal(values):
    return CallableOperator(lambda v: values * v, len(values), values.dtype)


def over_bulk(*lead):
    return torch.cat([torch.tensor(lead, dtype=torch.float64), BULK])


def missed(values, truth, tol, seeds=60, **options):
    """How many starts end further than the tolerance from the truth, and how many from all
    values."""
    wrong = between = 0
    for seed in range(seeds):
        result = top_eigenpairs(diagonal(values), tol=tol, seed=seed, **options)
        assert result.converged
        found = result.values[0]
        distance = float((values - found).abs().min())
        wrong += abs(float(found) - truth) > tol * abs(truth)
        between += distance > tol * abs(truth)
        assert result.error_bounds[0] <= tol * abs(found)
        assert distance <= result.error_bounds[0] or distance > tol * abs(truth)
    return wrong, between


@pytest.mark.parametrize(
    ("lead", "tol"),
    [
        ((1.0, 0.99), 1e-3),
        ((1.0, 0.98), 1e-2),
        ((1.0, 0.998), 1e-4),
        ((1.0, 0.992, 0.985), 1e-3),
        ((1.0, 0.99, 0.985, 0.98), 1e-3),
        ((1.0, 0.999), 1e-6),
    ],
)
def test_the_mean_of_close_values_is_not_called_converged(lead, tol):
    """It lies between, or is the smaller; of two 1 % apart 45 of 60 starts were wrong at 1e-3."""
    wrong, between = missed(over_bulk(*lead), 1.0, tol)
    assert wrong <= 6
    assert between <= 1


@pytest.mark.parametrize(("which", "sign"), [("LA", 1), ("SA", -1)])
def test_nor_at_one_end_alone(which, sign):
    wrong, between = missed(sign * over_bulk(1.0, 0.99), sign, 1e-3, which=which)
    assert wrong <= 6
    assert between <= 1


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("products", [3, 6, 10, 15])
def test_bounds_hold_wherever_the_search_ends(products, k):
    for seed in range(20):
        values = over_bulk(1.0, 0.99, 0.985, -0.97)
        result = top_eigenpairs(diagonal(values), k, tol=1e-3, max_matvecs=products, seed=seed)
        distances = (values[:, None] - result.values).abs().min(dim=0).values
        assert (distances <= result.error_bounds).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_of_a_tie_of_signs_the_positive_one_is_returned_whatever_the_start(dtype, tol):
    values = torch.cat([torch.tensor([1.0, -1.0]), torch.linspace(-0.8, 0.8, 200)]).to(dtype)
    for seed in range(40):
        result = top_eigenpairs(diagonal(values), tol=tol, seed=seed)
        assert result.values.item() == pytest.approx(1.0, rel=tol)
        assert result.converged


def test_also_where_the_tie_is_the_last_of_several():
    values = torch.cat([torch.tensor([3.0, 2.0, -2.0]), torch.linspace(-1.5, 1.5, 100)]).double()
    for seed in range(20):
        result = top_eigenpairs(diagonal(values), 2, seed=seed)
        assert result.values == pytest.approx([3.0, 2.0], rel=1e-3)


@pytest.mark.parametrize("lead", [(1.0, -1.02), (0.98, -1.0), (0.7, -1.0)])
def test_a_negative_value_that_is_larger_by_more_than_the_tolerance_leads(lead):
    values = torch.cat([torch.tensor(lead), torch.linspace(-0.6, 0.6, 200)]).double()
    for seed in range(40):
        result = top_eigenpairs(diagonal(values), tol=1e-3, seed=seed)
        assert result.values.item() == pytest.approx(lead[1], rel=1e-3)


def critic(seed):
    """A critic, its loss linear in the outputs: without biases its spectrum is symmetric."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(5, 7, bias=False), torch.nn.ReLU(), torch.nn.Linear(7, 3, bias=False)
    batch = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    return torch.nn.Sequential(*layers).double(), lambda out, target: (out * target).mean(), batch


@pytest.mark.parametrize("problem", [2, 5, 7])
def test_the_sign_of_a_critic_does_not_hang_on_the_seed(problem):
    model, loss_fn, batch = critic(problem)
    operator = HessianOperator(model, loss_fn, batch)
    exact = torch.linalg.eigvalsh(operator.dense())
    assert exact[0] == pytest.approx(-exact[-1])  # a tie
    for seed in range(20):
        found = top_eigenpairs(operator, seed=seed).values.item()
        assert found == pytest.approx(float(exact[-1]), rel=1e-3)


def test_a_probe_does_not_change_its_sign_from_one_cold_call_to_the_next():
    model, loss_fn, batch = critic(2)
    probe = CurvatureProbe(model, loss_fn, batch, cold_every=1)
    assert all(probe().eigenvalue > 0 for _ in range(20))


SMALL_BESIDE_HUGE = {
    "the largest 1e6": (1e6, 5, 1e-2),
    "the largest 1e7, zero for float32 but for one": (1e7, 3, 1e-2),
    "the largest -3e5": (-3e5, 4, 1e-3),
}


@pytest.mark.parametrize("name", SMALL_BESIDE_HUGE)
def test_small_values_beside_a_huge_one_are_not_called_converged_in_float32(name):
    """Right to the tolerance, or not converged; the bounds hold in either case."""
    largest, k, tol = SMALL_BESIDE_HUGE[name]
    for seed in range(3):
        values = [largest, 4.0, 1.0, 0.9, 0.8, 0.7, *torch.linspace(0, 0.3, 194).tolist()]
        matrix = symmetric(values, seed).float()
        exact = np.linalg.eigvalsh(matrix.double().numpy())
        truth = exact[np.argsort(-np.abs(exact))][:k]
        result = top_eigenpairs(operator_of(matrix), k, tol=tol, seed=seed)
        found = result.values.numpy()
        assert not result.converged or (np.abs(found - truth) <= tol * np.abs(truth)).all()
        distances = np.abs(found[:, None] - exact).min(axis=1)
        assert (distances <= result.error_bounds.numpy()).all()
        assert found[0] == pytest.approx(largest, rel=1e-5)
        double = top_eigenpairs(operator_of(matrix.double()), k, tol=tol, seed=seed)
        assert double.converged
        assert double.values.numpy() == pytest.approx(truth, rel=tol)


def semicircle(size=150):
    random = np.random.default_rng(1).standard_normal((size, size))
    return torch.tensor((random + random.T) / 60)


@pytest.mark.parametrize(("k", "which"), [(1, "LM"), (3, "LM"), (2, "SA")])
@pytest.mark.parametrize("residual_tol", [1e-4, 1e-8])
def test_residuals_are_as_small_as_was_asked_for(k, which, residual_tol):
    matrix, asked = semicircle(), {"residual_tol": residual_tol, "max_matvecs": 1000}
    result = top_eigenpairs(operator_of(matrix), k, which=which, seed=0, **asked)
    residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    assert result.converged
    assert (residuals <= residual_tol * result.values.abs() * (1 + 1e-6)).all()


def test_without_the_residual_rule_vectors_are_rougher():
    """So the rule above does something."""
    matrix = semicircle()
    result = top_eigenpairs(operator_of(matrix), 3, tol=1e-8, seed=0, max_matvecs=500)
    assert (result.residuals > 1e-8 * result.values.abs()).any()


def test_a_residual_below_rounding_is_not_called_converged():
    matrix = symmetric([3.0, 2.0, *torch.linspace(-1, 1, 60).tolist()]).float()
    assert not top_eigenpairs(operator_of(matrix), 2, residual_tol=1e-9, seed=0).converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_tol": 0.0}, "residual_tol must be positive or None, got 0.0"),
        ({"residual_tol": float("nan")}, "residual_tol must be positive or None, got nan"),
        ({"residual_tol": 1e-3, "method": "power"}, "'power' stops by residuals: give tol"),
    ],
)
def test_a_residual_rule_that_means_nothing_is_refused(options, message):
    with pytest.raises(HessianFlowError, match=message):
        top_eigenpairs(diagonal(BULK), **options)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4, 5, 8, 15])
@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_of_few_rows_the_leading_value_is_never_missed(size, tol):
    """A start with next to no part in the leading vector settles on another one after two
    products."""
    source = np.random.default_rng(size)
    for seed in range(100):
        basis, _ = np.linalg.qr(source.standard_normal((size, size)))
        matrix = (basis * source.standard_normal(size)) @ basis.T
        matrix = torch.from_numpy((matrix + matrix.T) / 2)
        result = top_eigenpairs(
            CallableOperator(matrix.mv, size, torch.float64), 1, tol=tol, seed=seed
        )
        exact = np.abs(np.linalg.eigvalsh(matrix.numpy())).max()
        assert result.converged
        assert abs(abs(float(result.values[0])) - exact) <= tol * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "diagonal", [(2.0,) * 7, (0.0,) * 7, (0.0,) * 6 + (-3.0,), (1.0, -1.0, 0.0)]
)
def test_few_rows_that_lead_nowhere_new_are_taken_all_the_same(diagonal, dtype):
    entries = torch.tensor(diagonal, dtype=dtype)
    result = top_eigenpairs(CallableOperator(lambda v: entries * v, len(diagonal), dtype), seed=0)
    assert result.converged
    torch.testing.assert_close(result.values.abs()[0], entries.abs().max())
