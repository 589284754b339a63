"""The probe in a training loop: right values, warm starts that cannot be fooled, bit-identical
resumption, no trace."""

import copy
import math

import pytest
import torch
from problems import (
    classification,
    clustered,
    conv_net,
    dense_hessian,
    mlp,
    operator_of,
    symmetric,
    train,
)

from hessianflow.curvature import CallableOperator, CurvatureProbe, top_eigenpairs
from hessianflow.curvature.probe import GRADIENTS_PER_PRODUCT, _mixed
from hessianflow.curvature.warm_start import SPARE_VECTORS, remembered
from hessianflow.interfaces import HessianFlowError


def small(seed=0):
    problem = classification(mlp((5, 8, 4), seed), (5,), 64, 4)
    train(problem, 5)
    return problem


def probe_of(problem, **options):
    return CurvatureProbe(problem.model, problem.loss_fn, problem.pair, **options)


def spectrum(problem):
    values = torch.linalg.eigvalsh(dense_hessian(problem))
    return values[values.abs().argsort(descending=True)]


def test_follows_the_leading_eigenvalues_through_training():
    problem = small()
    probe = probe_of(problem, k=2, tol=1e-4)
    for step in range(6):
        reading = probe()
        truth = spectrum(problem)[:2].tolist()
        assert reading.eigenvalue == pytest.approx(truth[0], rel=1e-4)
        assert reading.eigenvalues == pytest.approx(truth, rel=1e-4)
        assert reading.converged
        assert reading.residual <= 0.01 * abs(reading.eigenvalue)
        assert (reading.num_examples, reading.norm_mode) == (64, "eval")
        train(problem, 5, seed=step)


def test_warm_starts_save_products():
    problem = small()
    warm, cold = probe_of(problem), probe_of(problem, warm_start=False)
    counts = []
    for step in range(6):
        counts.append((warm().matvecs, cold().matvecs))
        train(problem, 3, lr=0.01, seed=step)
    assert counts[0][0] == counts[0][1]
    assert sum(w for w, _ in counts[1:]) <= 0.6 * sum(c for _, c in counts[1:])


@pytest.mark.parametrize("gap", [0.03, 0.08, 0.2])
@pytest.mark.parametrize("rival", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_eigenvalues_that_changed_places_do_not_fool_it(gap, rival, seed):
    """From the old leading vector alone the search settles on what is now the second value, low by
    the gap."""
    n = 1000
    before = torch.cat(
        [torch.tensor([1.0, 0.96, 0.9, 0.5, 0.4, 0.3, 0.2]), torch.linspace(-0.05, 0.1, n - 7)]
    ).double()
    first = top_eigenpairs(
        operator_of(torch.diag(before)), tol=1e-2, seed=seed, extra=SPARE_VECTORS
    )
    after = before.clone()
    after[rival] = 1 + gap
    operator = operator_of(torch.diag(after))
    safe = top_eigenpairs(operator, tol=1e-2, v0=remembered(first), seed=seed, warm=True)
    old = torch.eye(n, 1, dtype=torch.float64)
    fooled = top_eigenpairs(operator, tol=1e-2, v0=old[:, 0], seed=seed, warm=True)
    assert safe.values.item() == pytest.approx(1 + gap, rel=1e-2)
    assert fooled.values.item() == pytest.approx(1.0, rel=1e-2)  # the trap is real
    assert fooled.residuals.item() < 0.02


def test_a_vector_that_no_memory_holds_is_found_by_the_next_cold_start():
    problem = small()
    probe = probe_of(problem, cold_every=2)
    probe()
    truth = float(spectrum(problem)[0])
    # Whatever the stored start is worth, the third call (number 2) does not read it.
    probe()
    probe._start = torch.eye(len(probe._start), dtype=torch.float64)[0]
    assert probe().eigenvalue == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("gap", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "head", [[1.0, 0.3, 0.12, 0.08], [1.0, 0.96, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5]]
)
def test_a_new_leading_vector_outside_the_memory_is_found_in_a_few_calls(head, gap):
    """It lies in the bulk of 20,000 values at first; products add up over calls, as a cold start
    would spend them."""
    bulk = torch.linspace(-0.02, 0.04, 20000 - len(head), dtype=torch.float64)
    for seed in range(4):
        diagonal = torch.cat([torch.tensor(head, dtype=torch.float64), bulk])
        operator = CallableOperator(lambda v, d=diagonal: d * v, len(diagonal), torch.float64)
        result, calls = top_eigenpairs(operator, tol=1e-2, seed=seed, extra=SPARE_VECTORS), 0
        diagonal[100] = 1 + gap
        while abs(float(result.values[0]) - 1 - gap) > 0.01 * (1 + gap) and calls < 10:
            calls += 1
            start = remembered(result)
            result = top_eigenpairs(
                operator, tol=1e-2, v0=start, seed=calls, extra=SPARE_VECTORS, warm=True
            )
        assert calls <= 4


def test_seeds_of_any_size_differ_from_call_to_call():
    problem = small()
    probes = [
        probe_of(problem, seed=seed, warm_start=False, max_matvecs=2)
        for seed in (0, 2**32, 2**64 + 1)
    ]
    assert len({probe().eigenvalue for probe in probes for _ in range(2)}) == 6
    assert len({_mixed(seed, call) for seed in range(100) for call in range(100)}) == 10000
    assert all(0 <= _mixed(seed, 3) < 2**63 for seed in (-1, 0, 2**70))


@pytest.mark.parametrize(
    "options", [{}, {"k": 2, "smoothing": "ema", "window": 2}, {"microbatch_size": 20}]
)
def test_a_resumed_probe_reads_the_same_bits(options):
    problem = small()
    first = probe_of(problem, **options)
    for step in range(3):
        first()
        train(problem, 2, seed=step)
    state = copy.deepcopy(first.state_dict())
    second = probe_of(problem, **options)
    second.load_state_dict(state)
    for step in range(3):
        a, b = first(), second()
        assert (a.eigenvalue, a.residual, a.matvecs, a.eigenvalues) == (
            b.eigenvalue,
            b.residual,
            b.matvecs,
            b.eigenvalues,
        )
        assert a.details == b.details
        train(problem, 2, seed=10 + step)


def test_the_state_is_loadable_without_running_code(tmp_path):
    problem = small()
    probe = probe_of(problem)
    probe()
    torch.save(probe.state_dict(), tmp_path / "probe.pt")
    state = torch.load(tmp_path / "probe.pt", weights_only=True)
    assert torch.equal(state["start"], probe.state_dict()["start"])
    assert state["start"].shape == (84,)  # one vector, however many it sums up


def test_a_fresh_batch_each_time():
    problem = small()
    drawn = []

    def draw():
        drawn.append(len(drawn))
        rows = slice(16 * (len(drawn) % 4), 16 * (len(drawn) % 4) + 16)
        return problem.inputs[rows], problem.targets[rows]

    probe = CurvatureProbe(problem.model, problem.loss_fn, draw)
    values = {probe().eigenvalue for _ in range(4)}
    assert drawn == [0, 1, 2, 3]
    assert len(values) == 4


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_what_is_not_finite_is_reported_and_forgotten(where):
    problem = small()
    probe = probe_of(problem, smoothing="median")
    good = probe()
    last = problem.model[-1].weight
    weights = last.detach().clone()
    with torch.no_grad():
        # Sums of eight such outputs overflow in any order of summation; under a tanh infinities
        # would be harmless.
        last.fill_(float("nan") if where == "weights" else 1e308)
    bad = probe()
    assert math.isnan(bad.eigenvalue)
    assert math.isnan(bad.residual)
    assert not bad.converged
    with torch.no_grad():
        last.copy_(weights)
    again = probe()
    assert again.eigenvalue == pytest.approx(good.eigenvalue, rel=1e-2)
    assert again.details["smoothed"] == pytest.approx(good.eigenvalue, rel=1e-2)


def test_too_few_products_are_reported_and_not_smoothed():
    reading = probe_of(small(), max_matvecs=1, smoothing="median")()
    assert not reading.converged
    assert math.isfinite(reading.eigenvalue)
    assert reading.details == {}


class Known(CallableOperator):
    """What a probe measures, with a leading value known in advance."""

    def __init__(self, value):
        diagonal = value * torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
        super().__init__(lambda v: diagonal * v, 4, torch.float64)

    def release(self):
        pass


def smoothed(values, **options):
    made = iter(values)
    probe = probe_of(small(), tol=1e-8, operator=lambda *_, **__: Known(next(made)), **options)
    return [probe().details["smoothed"] for _ in values], probe


def test_smoothing_against_hand_worked_values():
    assert smoothed([4.0, 1.0, 10.0], smoothing="median", window=3)[0] == pytest.approx(
        [4.0, 2.5, 4.0]
    )
    # weight 2 / (3 + 1) = 1/2: 4 -> 2.5 -> 6.25
    assert smoothed([4.0, 1.0, 10.0], smoothing="ema", window=3)[0] == pytest.approx(
        [4.0, 2.5, 6.25]
    )


def test_the_median_forgets_what_left_the_window_and_the_average_fades():
    values = [100.0, *[1.0] * 7]
    assert smoothed(values, smoothing="median", window=2)[0] == pytest.approx([100, 50.5, *[1] * 6])
    # weight 2 / (5 + 1) = 1/3: of the 99 above the others two thirds are left after each
    assert smoothed(values, smoothing="ema", window=5)[0] == pytest.approx(
        [1 + 99 * (2 / 3) ** n for n in range(8)]
    )


@pytest.mark.parametrize("exponent", [-100, 100])
def test_what_is_remembered_does_not_depend_on_the_unit_of_curvature(exponent):
    """Also where squares leave the range of float32: of the direction only its direction counts."""
    matrix = symmetric(clustered()).float()
    plain, scaled = (
        top_eigenpairs(operator_of(m), tol=1e-2, seed=0, extra=SPARE_VECTORS)
        for m in (matrix, matrix * 2.0**exponent)
    )
    assert torch.equal(remembered(plain), remembered(scaled))


def test_the_budget_spaces_itself_out_without_a_clock():
    problem = small()
    probe = probe_of(problem, budget=0.01)
    assert probe.is_affordable(0)
    reading = probe()
    cost = (1 + GRADIENTS_PER_PRODUCT * reading.matvecs) * 64
    assert not probe.is_affordable(int(2 * cost / 0.01) - 1)
    assert probe.is_affordable(math.ceil(2 * cost / 0.01))
    assert probe_of(problem).is_affordable(0)


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
def test_no_trace_on_model_or_generators(norm_mode):
    problem = classification(conv_net(), (1, 8, 8), 12)
    train(problem, 2)
    before, rng = copy.deepcopy(problem.model), torch.get_rng_state()
    reading = CurvatureProbe(problem.model, problem.loss_fn, problem.pair, norm_mode=norm_mode)()
    assert reading.norm_mode == norm_mode
    after = problem.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    assert [m.training for m in problem.model.modules()] == [m.training for m in before.modules()]
    assert all(p.grad is None for p in problem.model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_repeated_probes_do_not_grow():
    """Resident memory of the process: 60 probes after 30 to warm up; one leaked graph a call would
    be 6 MB in all."""
    from pathlib import Path

    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    problem = classification(mlp((64, 64, 10)), (64,), 128)
    probe = probe_of(problem)
    sizes = []
    for _ in range(90):
        probe()
        sizes.append(int(statm.read_text().split()[1]) * 4096)
    assert sizes[-1] - sizes[29] < 3e6


def test_microbatches_give_the_same_reading():
    problem = small()
    whole, split = probe_of(problem)(), probe_of(problem, microbatch_size=10)()
    assert split.eigenvalue == pytest.approx(whole.eigenvalue, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": "mean"}, "smoothing must be one of none, median, ema, got 'mean'"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"window": 2.5}, "window must be a whole number >= 1, got 2.5"),
        ({"cold_every": 0}, r"cold_every must be a whole number >= 1, got 0"),
        ({"cold_every": 1.5}, r"cold_every must be a whole number >= 1, got 1.5"),
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"tol": -1}, "tol must be positive, got -1"),
        ({"which": "XX"}, "which must be one of LM, LA, SA, got 'XX'"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1 or None, got 0"),
        ({"norm_mode": "foo"}, "norm_mode must be one of eval, batch, got 'foo'"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1 or None, got 0"),
        (
            {"budget": 0.0},
            "budget must be a positive share of the training cost, e.g. 0.01, got 0.0",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(HessianFlowError, match=message):
        probe_of(small(), **options)
