"""Muon against torch's own, bit for bit where it orthogonalises as torch does, and against the
published formulas in double precision, matrix by matrix."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import SAM, Muon, muon_groups
from hessianflow.optim.orthogonalise import orthogonalised

F64 = torch.float64
SHAPES: list[tuple[int, ...]] = [(5, 7), (7, 5), (5, 7), (16, 144), (64, 32), (16, 144), (3, 3)]


def draws(
    shapes: list[tuple[int, ...]], steps: int, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=F64).to(dtype)  # noqa: E731
    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(steps)]


def leaves(weights: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(weight.clone()) for weight in weights]


def run(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[list[Tensor]]
) -> list[Tensor]:
    for step in gradients:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in params]


@pytest.mark.parametrize("form", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs_bit_for_bit_in_bfloat16(form: str, nesterov: bool, decay: float) -> None:
    """The peer takes one matrix at a time; ours takes those of a shape together."""
    weights, gradients = draws(SHAPES, 20, torch.float32)
    ours, theirs = leaves(weights), leaves(weights)
    common: dict[str, Any] = {"momentum": 0.95, "nesterov": nesterov, "weight_decay": decay}
    moved = run(Muon(ours, 0.02, form=form, precision="bfloat16", **common), ours, gradients)
    peer = torch.optim.Muon(theirs, 0.02, adjust_lr_fn=form, **common)
    for shape, mine, other in zip(SHAPES, moved, run(peer, theirs, gradients), strict=True):
        assert torch.equal(mine, other), shape


def orthogonal(matrix: Tensor) -> Tensor:
    """The iteration as published, on the singular values alone: s <- a s + b s^3 + c s^5."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def reference(
    weights: list[Tensor], gradients: list[list[Tensor]], form: str, nesterov: bool
) -> list[Tensor]:
    """The rules of the reference note in float64, with rate 0.1, momentum 0.6 and decay 0.05."""
    found = []
    for index, weight in enumerate(weights):
        shape = weight.shape
        w = weight.flatten(1)
        memory = torch.zeros_like(w)
        rows, columns = w.shape
        for step in gradients:
            g = step[index].reshape(rows, columns)
            memory = 0.6 * memory + g
            update = orthogonal(g + 0.6 * memory if nesterov else memory)
            if form == "renormalised":
                w = w * math.sqrt(rows) / w.norm()
            scales = {"original": max(1, rows / columns) ** 0.5, "renormalised": 1.0}
            scales["match_rms_adamw"] = 0.2 * max(rows, columns) ** 0.5
            w = (1 - 0.1 * 0.05) * w - 0.1 * scales[form] * update
        found.append(w.reshape(shape))
    return found


@pytest.mark.parametrize("form", ["original", "match_rms_adamw", "renormalised"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_the_published_rule_in_its_own_precision(form: str, nesterov: bool) -> None:
    """The reference iterates on singular values, so that it shares no product with ours."""
    weights, gradients = draws([*SHAPES, (6, 3, 3, 3), (8, 5, 1, 1)], 6)
    params = leaves(weights)
    optimizer = Muon(params, 0.1, momentum=0.6, weight_decay=0.05, form=form, nesterov=nesterov)
    expected = reference(weights, gradients, form, nesterov)
    for ours, other in zip(run(optimizer, params, gradients), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (64, 64), (64, 32), (1, 9), (5, 1)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    """The published polynomial keeps what is not tiny between 0.68 and 1.14 after five steps."""
    [matrix], _ = draws([shape], 0)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linspace(0.05, 1, min(shape), dtype=F64)
    [found] = orthogonalised([left @ torch.diag(values) @ right], F64)
    assert torch.linalg.svdvals(found).min() > 0.67
    assert torch.linalg.svdvals(found).max() < 1.21


def test_single_precision_is_near_double_where_singular_values_span_six_powers_of_ten() -> None:
    """Squares lose what lies below the root of the precision; 1e-3 of the result was measured."""
    [matrix], _ = draws([(16, 144)], 0)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -6, 16, dtype=F64)) @ right
    [found] = orthogonalised([matrix.float()], torch.float32)
    expected = orthogonal(matrix)
    assert float((found - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize("form", ["original", "match_rms_adamw", "renormalised"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(
    form: str, memory_format: torch.memory_format
) -> None:
    weights, gradients = draws([(8, 5, 3, 3), (8, 4, 1, 1)], 5)
    flat = leaves([weight.flatten(1) for weight in weights])
    whole = leaves([weight.contiguous(memory_format=memory_format) for weight in weights])
    expected = run(
        Muon(flat, 0.1, form=form), flat, [[g.flatten(1) for g in step] for step in gradients]
    )
    for ours, other in zip(
        run(Muon(whole, 0.1, form=form), whole, gradients), expected, strict=True
    ):
        torch.testing.assert_close(ours.flatten(1), other, rtol=1e-13, atol=1e-13)


def test_the_rest_takes_the_step_of_torchs_sgd_or_adamw() -> None:
    weights, gradients = draws([(4, 4), (6,), (2, 3)], 10)
    for rest, make in (
        ("sgd", lambda own: torch.optim.SGD(own, 0.125, momentum=0.9, weight_decay=0.1)),
        ("adamw", lambda own: torch.optim.AdamW(own, 0.125, betas=(0.8, 0.9), weight_decay=0.1)),
    ):
        ours, theirs = leaves(weights), leaves(weights)
        groups = [{"params": ours[:1]}, {"params": ours[1:], "part": "rest"}]
        options: dict[str, Any] = {"rest": rest, "rest_rate": 0.5, "rest_decay": 0.1}
        moved = run(Muon(groups, 0.25, betas=(0.8, 0.9), **options), ours, gradients)
        run(make(theirs[1:]), theirs, gradients)
        for mine, other in zip(moved[1:], theirs[1:], strict=True):
            assert torch.equal(mine, other.detach()), rest
        assert not torch.equal(moved[0], weights[0])


def test_rates_set_for_all_groups_keep_their_ratios() -> None:
    """Twice the rate of all groups is twice the first step of every parameter but the norm's."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    before = [p.detach().clone() for p in model.parameters()]
    moves = []
    for rate in (0.1, 0.2):
        again = copy.deepcopy(model)
        optimizer = Muon(muon_groups(again), 9.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, [gradients] = draws([tuple(p.shape) for p in before], 1)
        after = run(optimizer, list(again.parameters()), [gradients])
        moves.append([new - old for new, old in zip(after, before, strict=True)])
    for single, double in zip(*moves, strict=True):
        torch.testing.assert_close(2 * single, double, rtol=1e-12, atol=1e-12)


def test_zeros_stay_and_a_bad_gradient_spoils_its_own_matrix_alone() -> None:
    for form in ("original", "renormalised"):
        zeros = torch.zeros(3, 3, dtype=F64)
        unit = torch.eye(3, dtype=F64)
        params = leaves([unit, zeros, unit])
        moved = run(Muon(params, 0.1, form=form), params, [[zeros, zeros, math.nan * unit]])
        assert torch.equal(moved[0], unit)
        assert torch.equal(moved[1], zeros)
        assert moved[2].isnan().all()  # as torch's optimizers pass it on, so that a guard sees it


def test_frozen_parameters_and_those_without_a_gradient_are_left() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    optimizer = Muon(muon_groups(model), 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model[1].parameters()}
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_the_rate_0_moves_no_weight() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = Muon(muon_groups(model), 0.0, weight_decay=0.1)
    assert optimizer.param_groups[0]["rule"] == "renormalised"
    before = copy.deepcopy(list(model.parameters()))
    model(torch.randn(4, 1, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_group_with_a_rule_of_its_own_needs_the_options_of_that_rule() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))], 0.1)
    group = {"params": [nn.Parameter(torch.ones(3))], "part": "rest", "rule": "adamw"}
    with pytest.raises(HessianFlowError, match="the rule 'adamw' needs betas, eps, too"):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**group, "betas": (0.9, 0.99), "eps": 1e-8})
    assert len(optimizer.param_groups) == 2


def test_saved_loaded_continued_is_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for options in ({}, {"rest": "adamw"}):
        whole, half, resumed = (copy.deepcopy(model) for _ in range(3))
        shapes = [tuple(p.shape) for p in model.parameters()]
        _, gradients = draws(shapes, 8, torch.float32)
        expected = run(
            Muon(muon_groups(whole), 0.1, **options), list(whole.parameters()), gradients
        )
        first = Muon(muon_groups(half), 0.1, **options)
        run(first, list(half.parameters()), gradients[:4])
        resumed.load_state_dict(half.state_dict())
        second = Muon(muon_groups(resumed), 9.0, **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        found = run(second, list(resumed.parameters()), gradients[4:])
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine, other)


def test_a_copy_goes_on_and_takes_further_groups() -> None:
    """torch keeps only the groups and the state of a copied optimizer."""
    [weight], gradients = draws([(3, 4)], 2)
    [parameter] = leaves([weight])
    optimizer = Muon([parameter], 0.1, rest_rate=0.5)
    copied = copy.deepcopy(optimizer)
    [twin] = copied.param_groups[0]["params"]
    assert torch.equal(run(optimizer, [parameter], gradients)[0], run(copied, [twin], gradients)[0])
    copied.add_param_group({"params": [torch.ones(3, requires_grad=True)], "part": "rest"})
    assert copied.param_groups[1]["rate_factor"] == 0.5


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    [weight] = leaves(draws([(3, 4)], 0)[0])
    optimizer = Muon([weight], 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = float(weight.detach().square().sum())
    with torch.no_grad():
        assert optimizer.step(closure).item() == before
    assert float(weight.detach().square().sum()) < before
    with pytest.raises(HessianFlowError, match="closure must return the loss, got None"):
        optimizer.step(lambda: None)


def test_sam_steps_it() -> None:
    [weight] = leaves(draws([(3, 4)], 0)[0])
    optimizer = SAM(Muon([weight], 0.1), rho=0.0)
    twin = nn.Parameter(weight.detach().clone())

    def closure() -> float:
        weight.grad = weight.detach().clone()
        return 1.0

    optimizer.step(closure)
    run(Muon([twin], 0.1), [twin], [[twin.detach().clone()]])
    assert torch.equal(weight.detach(), twin.detach())


def test_the_number_of_products_does_not_grow_with_the_matrices() -> None:
    """A batch of matrices of one shape is orthogonalised by as many products as one matrix."""
    counts = []
    for number in (1, 8):
        params = leaves(draws([(4, 16)] * number, 0)[0])
        optimizer = Muon(params, 0.1)
        run(optimizer, params, draws([(4, 16)] * number, 1)[1])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        events = [event.name for event in profile.events()]
        counts.append(sum(name in ("aten::bmm", "aten::baddbmm") for name in events))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be a finite number >= 0, got -1"),
        ({"lr": torch.tensor(0.1)}, r"lr must be a finite number >= 0, got tensor"),
        ({"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
        ({"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
        ({"form": "new"}, "form must be one of auto, original, .*, got 'new'"),
        ({"rest": "lamb"}, "rest must be one of sgd, adamw, got 'lamb'"),
        ({"precision": "fp8"}, "precision must be one of auto, bfloat16, own, got 'fp8'"),
        ({"unnormalised_rate": math.nan}, "unnormalised_rate must be a finite number >= 0"),
        ({"rest_rate": -1}, "rest_rate must be a finite number >= 0, got -1"),
        ({"rest_momentum": 2}, "rest_momentum must be a finite number >= 0 and < 1, got 2"),
        ({"rest_decay": -1}, "rest_decay must be a finite number >= 0, got -1"),
        ({"rest": "adamw", "betas": (0.9,)}, r"betas must be two numbers .* got \(0.9,\)"),
        ({"rest": "adamw", "eps": -1}, "eps must be a finite number >= 0, got -1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    groups = [
        {"params": [torch.ones(2, 2, requires_grad=True)]},
        {"params": [torch.ones(2, requires_grad=True)], "part": "rest"},
    ]
    with pytest.raises(HessianFlowError, match=message):
        Muon(groups, **{"lr": 0.1, **options})  # type: ignore[arg-type]


def test_parameters_that_are_no_real_dense_matrices_are_refused() -> None:
    square, vector = torch.ones(2, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    with pytest.raises(HessianFlowError, match=r"number 1 has the shape \[3\]: build it as Muon\("):
        Muon([square, vector], 0.1)
    with pytest.raises(HessianFlowError, match=r"Muon needs real dense .* number 0 is complex"):
        Muon([torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)], 0.1)
    with pytest.raises(HessianFlowError, match=r"part must be one of .*, got 'head'"):
        Muon([{"params": [square], "part": "head"}], 0.1)
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = Muon([{"params": [table.weight], "part": "rest"}], 0.1)
    with pytest.raises(HessianFlowError, match=r"Muon needs dense gradients, got torch\.sparse"):
        optimizer.step()
    added = Muon([square], 0.1)
    added.add_param_group({"params": [vector]})  # a resumed run adds groups before their options
    vector.grad = torch.ones(3)
    with pytest.raises(HessianFlowError, match=r"number 0 has the shape \[3\]"):
        added.step()
