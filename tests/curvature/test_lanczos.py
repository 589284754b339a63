"""Lanczos on prescribed spectra: values, residuals, orthonormality, counts, and what makes others
fail."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import clustered, operator_of, symmetric

from hessianflow.curvature import CallableOperator, NonFiniteError, top_eigenpairs
from hessianflow.interfaces import HessianFlowError

SPECTRA = {
    "clustered": clustered(),
    "indefinite": torch.linspace(-7, 5, 40).tolist(),
    "rank-deficient": [4.0, -2.0, 1.0] + [0.0] * 30,
    "tiny scale": [1e-12 * v for v in clustered()],
    "definite": [0.7**i for i in range(30)],
}


def wanted(spectrum, which, k):
    key = {"LM": abs, "LA": lambda v: v, "SA": lambda v: -v}[which]
    return sorted(spectrum, key=key, reverse=True)[:k]


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 4])
def test_finds_the_wanted_end_of_any_spectrum(name, which, k):
    spectrum = SPECTRA[name]
    matrix = symmetric(spectrum)
    result = top_eigenpairs(operator_of(matrix), k, which=which, tol=1e-6, seed=3)
    truth = torch.tensor(wanted(spectrum, which, k), dtype=torch.float64)
    scale = max(abs(v) for v in spectrum)
    assert result.converged
    assert (result.values - truth).abs().max() <= 1e-6 * scale
    # residuals are those of the matrix itself, and vectors orthonormal to rounding
    residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    torch.testing.assert_close(residuals, result.residuals, rtol=1e-6, atol=1e-13 * scale)
    gram = result.vectors.T @ result.vectors
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-12


def test_every_value_lies_within_its_residual_of_an_eigenvalue():
    spectrum = torch.tensor(SPECTRA["indefinite"], dtype=torch.float64)
    for products in range(2, 30, 3):
        result = top_eigenpairs(
            operator_of(symmetric(spectrum.tolist())), 2, tol=1e-9, max_matvecs=products, seed=0
        )
        distance = (result.values[:, None] - spectrum[None, :]).abs().min(dim=1).values
        assert (distance <= result.residuals + 1e-12).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-50, 50), unique=True, min_size=1, max_size=25), st.integers(0, 100))
def test_any_small_spectrum_of_distinct_values_is_found(spectrum, seed):
    k = min(3, len(spectrum))
    result = top_eigenpairs(operator_of(symmetric(spectrum, seed)), k, tol=1e-14, seed=seed)
    found = result.values.abs().tolist()
    truth = [abs(v) for v in wanted(spectrum, "LM", k)]
    # +v and -v may come in either order; their magnitudes agree
    assert found == pytest.approx(truth, abs=1e-5 * max(1e-300, *map(abs, spectrum)))


def test_no_ghost_copies_after_many_steps():
    """Without reorthogonalisation the top value 100 x above the bulk comes back again and again."""
    spectrum = [100.0, *torch.linspace(0, 1, 199).tolist()]
    result = top_eigenpairs(operator_of(symmetric(spectrum)), 10, tol=1e-8, seed=0)
    assert int((result.values > 50).sum()) == 1
    assert result.values[1:] == pytest.approx(torch.linspace(1, 0, 199)[:9].tolist(), abs=1e-6)


def test_restarts_keep_converging_in_bounded_memory():
    from hessianflow.curvature.lanczos import lanczos

    spectrum = torch.linspace(0, 1, 300).tolist()
    operator, source = operator_of(symmetric(spectrum)), torch.Generator().manual_seed(0)
    start = torch.randn(300, 1, generator=source, dtype=torch.float64)
    options = {"which": "LA", "tol": 1e-8, "max_matvecs": 2000, "start": start, "source": source}
    result = lanczos(operator, 2, max_basis=12, **options)
    assert result.converged
    assert result.matvecs > 24  # it did restart
    assert result.values == pytest.approx([1.0, 298 / 299], abs=1e-8)


CROWDED = {
    "outliers and close ones": [1000.0, 600, 400, 192, 191, 189, -188, 172, 171, 100, 80, -50],
    "a wide range": [3310.0, 1004, 377, 248.6, 192.2, 171.6, 101, -82.9, 73.8, -70.2],
    "three equal, then two": [5.0, 5, 5, 3, 3, 2.9, -3],
    "1 % apart": [1.0 - 0.01 * n for n in range(12)],
    "indefinite pairs": [4.0, -4, 3, -3, 2.5, -2.4],
}


@pytest.mark.parametrize("name", CROWDED)
def test_no_wrong_value_among_several_is_called_converged(name):
    """Eigenvalue by eigenvalue against the diagonal, from 25 starts: one start may have no part in
    one of them."""
    outliers = torch.tensor(CROWDED[name], dtype=torch.float64)
    bulk = outliers.abs().max() * 0.03 * torch.linspace(-0.5, 1, 2000, dtype=torch.float64) ** 3
    diagonal = torch.cat([outliers, bulk])
    truth = diagonal.abs().sort(descending=True).values[:5]
    operator = CallableOperator(lambda v: diagonal * v, len(diagonal), torch.float64)
    converged = 0
    for seed in range(25):
        result = top_eigenpairs(operator, 5, seed=seed)
        if result.converged:
            converged += 1
            assert result.values.abs() == pytest.approx(truth, rel=1e-3)
    assert converged >= 24


def test_the_top_five_of_a_resnet_like_spectrum_take_few_products():
    """The spectrum measured on a trained ResNet-20; the budget includes the check."""
    diagonal = torch.cat(
        [torch.tensor(CROWDED["a wide range"]), 50 * torch.linspace(-0.5, 1, 20000) ** 3]
    )
    operator = CallableOperator(lambda v: diagonal * v, len(diagonal))
    assert statistics.median(top_eigenpairs(operator, 5, seed=s).matvecs for s in range(15)) <= 21


def test_a_check_that_the_budget_cuts_short_is_not_converged():
    operator = operator_of(symmetric([9.0, 7.0, 5.0, *torch.linspace(-0.1, 0.1, 200).tolist()]))
    needed = top_eigenpairs(operator, 2, seed=0).matvecs
    short = top_eigenpairs(operator, 2, seed=0, max_matvecs=needed - 1)
    assert short.values == pytest.approx([9.0, 7.0], rel=1e-3)
    assert not short.converged


@pytest.mark.parametrize("width", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_near_a_multiple_of_the_identity_one_product_is_no_evidence(width, tol):
    """Every vector has a residual of a few per mille there; the leading value is 17 % higher."""
    diagonal = torch.cat([torch.tensor([3.0]), 2.5 + width * torch.linspace(-1, 1, 999)]).double()
    operator = CallableOperator(lambda v: diagonal * v, 1000, torch.float64)
    for seed in range(20):
        result = top_eigenpairs(operator, tol=tol, seed=seed)
        assert result.converged
        assert result.values.item() == pytest.approx(3.0, rel=tol)


NEAR_ROUNDING = {
    "smallest of values up to 100": (
        [100.0, -0.01, *torch.linspace(-0.0095, 1, 198).tolist()],
        1,
        "SA",
        1e-3,
    ),
    "its neighbours 1 % away": (
        [100.0, -0.01, *torch.linspace(-0.0099, 1, 198).tolist()],
        1,
        "SA",
        1e-3,
    ),
    "top five, four of them small": (
        [1.0, 1e-4, 9e-5, 8e-5, 7e-5, *torch.linspace(0, 1e-5, 200).tolist()],
        5,
        "LM",
        1e-4,
    ),
}


@pytest.mark.parametrize("name", NEAR_ROUNDING)
def test_a_value_that_rounding_keeps_from_its_tolerance_is_not_called_converged(name):
    """Products in float32 are off by about 6e-6 of the largest value; the search must end there all
    the same."""
    spectrum, k, which, tol = NEAR_ROUNDING[name]
    worst = 0.0
    for seed in range(4):
        matrix = symmetric(spectrum, seed).float()
        truth = torch.tensor(
            wanted(torch.linalg.eigvalsh(matrix.double()).tolist(), which, k), dtype=torch.float64
        )
        result = top_eigenpairs(operator_of(matrix), k, which=which, tol=tol, seed=seed)
        error = float(((result.values - truth) / truth).abs().max())
        worst = max(worst, error)
        assert result.matvecs < 100
        assert result.converged == bool((result.error_bounds <= tol * result.values.abs()).all())
        assert error <= tol or not result.converged
    assert worst > tol  # the trap is real


@pytest.mark.parametrize(("which", "k"), [("LM", 6), ("LA", 4), ("SA", 4)])
def test_values_that_are_zero_up_to_rounding_count_as_converged(which, k):
    for seed in range(4):
        matrix = symmetric([4.0, -2.0, 1.0, *[0.0] * 60], seed).float()
        assert top_eigenpairs(operator_of(matrix), k, which=which, seed=seed).converged


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_rounding_is_no_matter_to_a_leading_value(tol):
    for seed in range(10):
        result = top_eigenpairs(
            operator_of(symmetric(clustered(), seed).float()), tol=tol, seed=seed
        )
        assert result.converged
        assert result.values.item() == pytest.approx(10.0, rel=tol)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_squares_beyond_the_range_of_float32_do_no_harm(scale, method):
    matrix = (symmetric([4.0, 2.0, *torch.linspace(-1, 1.9, 200).tolist()]) * scale).float()
    result = top_eigenpairs(operator_of(matrix), 2, method=method, tol=1e-4, seed=0)
    assert result.converged
    assert (result.values / scale) == pytest.approx([4.0, 2.0], rel=1e-4)
    residuals = (
        matrix.double() @ result.vectors.double() - result.vectors.double() * result.values.double()
    ).norm(dim=0)
    assert (residuals / scale) == pytest.approx(
        (result.residuals / scale).double(), rel=1e-2, abs=1e-5
    )


def test_a_tie_of_signs_gives_the_positive_one_first():
    spectrum = [3.0, -3.0, *torch.linspace(-1, 1, 30).tolist()]
    for seed in range(5):
        result = top_eigenpairs(operator_of(symmetric(spectrum, seed)), 2, seed=seed, tol=1e-8)
        assert result.values == pytest.approx([3.0, -3.0], abs=1e-6)
        assert result.converged


def test_repeated_eigenvalues_are_counted():
    """A Krylov space holds one vector of each eigenspace; the other must come from outside it."""
    result = top_eigenpairs(operator_of(symmetric([5.0, 5.0, 3.0] + [0.0] * 20)), 2, seed=0)
    assert result.values == pytest.approx([5.0, 5.0])
    result = top_eigenpairs(operator_of(torch.eye(6, dtype=torch.float64)), 3, seed=0)
    assert result.values == pytest.approx([1.0, 1.0, 1.0])
    assert result.converged


def test_zero_matrix_and_size_one():
    zero = top_eigenpairs(operator_of(torch.zeros(5, 5, dtype=torch.float64)), 2, seed=0)
    assert zero.converged
    assert zero.values.tolist() == [0.0, 0.0]
    one = top_eigenpairs(operator_of(torch.tensor([[-4.0]], dtype=torch.float64)), seed=0)
    assert (one.values.item(), one.matvecs, one.converged) == (-4.0, 1, True)


def test_few_products_are_not_called_converged():
    """A step count tied to k (two steps for one pair) is 50-90 % off on nets; here the result must
    say so."""
    operator = operator_of(symmetric(SPECTRA["indefinite"]))
    result = top_eigenpairs(operator, max_matvecs=2, seed=0)
    assert result.matvecs == 2
    assert not result.converged
    assert top_eigenpairs(operator, 5, max_matvecs=3, seed=0).values.shape == (3,)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("budget", [1, 2, 5, 17])
@pytest.mark.parametrize("which", ["LM", "SA"])
def test_never_more_products_than_allowed(method, budget, which):
    count = 0
    matrix = symmetric(SPECTRA["indefinite"])

    def product(vector):
        nonlocal count
        count += 1
        return matrix @ vector

    operator = CallableOperator(product, len(matrix), torch.float64)
    result = top_eigenpairs(
        operator, 3, method=method, which=which, tol=1e-10, max_matvecs=budget, seed=0
    )
    assert result.matvecs == count <= budget
    assert not result.converged


def test_an_outlier_takes_few_products_and_the_gap_decides():
    far = [10.0, *torch.linspace(0, 1, 199).tolist()]
    near = [1.02, *torch.linspace(0, 1, 199).tolist()]
    first = top_eigenpairs(operator_of(symmetric(far)), seed=0)
    second = top_eigenpairs(operator_of(symmetric(near)), seed=0)
    assert first.matvecs <= 7
    assert second.matvecs > first.matvecs
    assert second.values.item() == pytest.approx(1.02, rel=1e-3)


def test_a_start_on_the_second_eigenvector_does_not_hide_the_first():
    """Breakdown at the first step: the start is an exact eigenvector of a smaller eigenvalue."""
    matrix = torch.diag(torch.tensor([1.0, 5.0, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64))
    start = torch.zeros(6, dtype=torch.float64)
    start[0] = 1
    assert top_eigenpairs(operator_of(matrix), v0=start, seed=0).values.item() == pytest.approx(
        5.0, rel=1e-3
    )


def test_an_accurate_start_saves_products():
    operator = operator_of(symmetric(SPECTRA["definite"]))
    cold = top_eigenpairs(operator, seed=0)
    warm = top_eigenpairs(operator, v0=cold.vectors[:, 0], seed=1)
    assert warm.matvecs < cold.matvecs
    block = top_eigenpairs(operator, 2, v0=top_eigenpairs(operator, 2, seed=0).vectors, seed=1)
    assert block.values == pytest.approx([1.0, 0.7], rel=1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_more_start_vectors_than_rows_are_no_reason_for_doubt(k):
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    result = top_eigenpairs(
        operator_of(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), k, v0=start, seed=0
    )
    assert result.values == pytest.approx([3.0, 2.0, 1.0][:k])
    assert result.matvecs == 3
    assert result.converged


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_the_length_of_a_start_is_of_no_account(scale, method):
    """Also where its square leaves the range of float32."""
    operator, start = operator_of(symmetric(clustered()).float()), torch.linspace(-1, 1, 60)
    plain, scaled = (
        top_eigenpairs(operator, method=method, v0=v0, seed=0) for v0 in (start, scale * start)
    )
    assert plain.history == scaled.history
    assert top_eigenpairs(operator, method=method, seed=0).history != plain.history


def test_extra_pairs_come_at_no_product():
    operator = operator_of(symmetric(clustered()))
    plain, more = (top_eigenpairs(operator, 1, seed=0, extra=extra) for extra in (0, 2))
    assert plain.matvecs == more.matvecs
    assert more.vectors.shape == (60, 3)
    assert more.values[0] == plain.values[0]


def test_seeds_repeat_and_none_does_not():
    operator = operator_of(symmetric(SPECTRA["indefinite"]))
    state = torch.get_rng_state()
    first, again, other, fresh, fresh2 = (
        top_eigenpairs(operator, seed=seed, max_matvecs=3).values.item()
        for seed in (0, 0, 1, None, None)
    )
    assert first == again
    assert len({first, other, fresh, fresh2}) == 4
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_products_of_nan_stop_at_once(method):
    operator = CallableOperator(lambda v: v * float("nan"), 5)
    with pytest.raises(NonFiniteError, match="a product with the operator is not finite"):
        top_eigenpairs(operator, method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"k": 2.0}, "k must be a whole number >= 1, got 2.0"),
        ({"extra": -1}, "extra must be a whole number >= 0, got -1"),
        ({"extra": -1, "k": 2}, "extra must be a whole number >= 0, got -1"),
        ({"extra": 1.5}, "extra must be a whole number >= 0, got 1.5"),
        ({"k": 61}, "k must be between 1 and the operator's size 60, got 61"),
        ({"method": "qr"}, "method must be one of lanczos, power, got 'qr'"),
        ({"which": "XX"}, "which must be one of LM, LA, SA, got 'XX'"),
        ({"tol": 0.0}, "tol must be positive, got 0.0"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1 or None, got 0"),
        ({"max_matvecs": float("nan")}, "max_matvecs must be at least 1 or None, got nan"),
        ({"v0": torch.ones(3)}, r"v0 must have shape \[60\] or \[60, m\], got \[3\]"),
        ({"v0": torch.zeros(60)}, "v0 must be finite with no zero vector"),
        ({"v0": torch.full((60,), float("nan"))}, "v0 must be finite with no zero vector"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(HessianFlowError, match=message):
        top_eigenpairs(operator_of(symmetric(clustered())), **options)
