"""The noise scale of models: against dense float64 autograd, and unbiased on a known quadratic."""

import gc
import math
import random

import numpy as np
import pytest
import torch
from problems import classification, conv_net, mlp, symmetric
from test_noise_ratio import ratio_of
from torch import nn
from torch.nn import functional

from hessianflow.curvature import NonFiniteError, noise_scale
from hessianflow.curvature.pieces import Kept
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses import WeightedLoss

WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)
LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "ignored": nn.CrossEntropyLoss(ignore_index=2),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
}


def small(examples=61):
    return classification(mlp((5, 6, 4)), (5,), examples, 4)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(problem, loss_fn, cuts):
    """Gradient, Hessian and weight of each part, by autograd on flat weights: no code of ours."""
    names, tensors = zip(*problem.model.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]
    weight = getattr(loss_fn, "weight", None)
    ignored = getattr(loss_fn, "ignore_index", -100)
    per_class = torch.ones(4, dtype=torch.float64) if weight is None else weight

    def loss(vector, rows):
        pieces = [p.view_as(t) for p, t in zip(torch.split(vector, sizes), tensors, strict=True)]
        parameters = dict(zip(names, pieces, strict=True))
        outputs = torch.func.functional_call(problem.model, parameters, (problem.inputs[rows],))
        targets = problem.targets[rows]
        counts = per_class[targets] * (targets != ignored)
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return (counts * losses).sum() / counts.sum(), counts.sum()

    point = flat(tensors).requires_grad_()
    gradients, hessians, weights = [], [], []
    for rows in torch.arange(len(problem.targets)).tensor_split(cuts):
        value, count = loss(point, rows)
        gradients.append(torch.autograd.grad(value, point)[0])
        hessians.append(torch.autograd.functional.hessian(lambda w, r=rows: loss(w, r)[0], point))
        weights.append(count)
    return torch.stack(gradients), torch.stack(hessians), torch.stack(weights).double()


def check(found, expected, scale=1.0):
    assert found.reason[:20] == expected.reason[:20]
    assert found.numerator == pytest.approx(scale * expected.numerator, rel=1e-8)
    assert found.numerator_stderr == pytest.approx(scale * expected.numerator_stderr, rel=1e-8)
    assert found.denominator == pytest.approx(expected.denominator, rel=1e-8)
    assert found.denominator_stderr == pytest.approx(expected.denominator_stderr, rel=1e-8)
    assert found.low == pytest.approx(scale * expected.low, rel=1e-8)


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_equals_dense_autograd(loss_name, microbatch_size):
    problem = small()
    loss_fn = LOSSES[loss_name]
    found = noise_scale(
        problem.model, loss_fn, problem.pair, parts=7, microbatch_size=microbatch_size
    )
    gradients, hessians, weights = dense(problem, loss_fn, 7)
    scale = 61 / float(weights.sum())
    check(found.with_curvature, ratio_of(gradients, hessians, weights, False), scale)
    check(found.simple, ratio_of(gradients, hessians, weights, True), scale)
    assert (found.num_examples, found.num_parts, found.matvecs) == (61, 7, 14)
    assert found.with_curvature.numerator != 0


def test_equals_dense_autograd_in_the_geometry_of_an_optimizer():
    problem = small()
    source = torch.Generator().manual_seed(0)
    factors = [
        torch.rand(p.shape, generator=source, dtype=p.dtype) for p in problem.model.parameters()
    ]
    gradients, hessians, weights = dense(problem, LOSSES["plain"], 7)
    expected = ratio_of(gradients * flat(factors), hessians, weights, False)

    def scaled(pieces):
        return [piece * factor for piece, factor in zip(pieces, factors, strict=True)]

    def scaled_in_place(pieces):
        for piece, factor in zip(pieces, factors, strict=True):
            piece.mul_(factor)
        return pieces

    for update in (factors, scaled, scaled_in_place):
        found = noise_scale(problem.model, LOSSES["plain"], problem.pair, parts=7, update=update)
        check(found.with_curvature, expected)


def test_an_update_that_is_not_linear_is_that_of_a_part():
    problem = small()
    gradients, hessians, weights = dense(problem, LOSSES["plain"], 7)
    found = noise_scale(
        problem.model,
        LOSSES["plain"],
        problem.pair,
        parts=7,
        update=lambda pieces: [piece.sign() for piece in pieces],
    )
    check(found.with_curvature, ratio_of(gradients.sign(), hessians, weights, False))


def test_several_batches_are_the_parts_and_one_without_targets_that_count_is_left_out():
    problem = small()
    loss_fn = LOSSES["ignored"]
    cuts = [10, 19, 31, 40, 52]
    pairs = list(
        zip(problem.inputs.tensor_split(cuts), problem.targets.tensor_split(cuts), strict=True)
    )
    expected = ratio_of(*dense(problem, loss_fn, cuts), False)
    empty = (problem.inputs[:4], torch.full((4,), 2))
    counted = sum(int((targets != 2).sum()) for _, targets in pairs)
    found = noise_scale(problem.model, loss_fn, [pairs[0], empty, *pairs[1:]])
    check(found.with_curvature, expected, 65 / counted)
    assert (found.num_examples, found.num_parts) == (65, 6)


def test_a_dict_and_a_loss_that_states_its_weight():
    problem = small()
    parts = noise_scale(problem.model, LOSSES["ignored"], problem.pair, parts=7)

    def loss(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["labels"], ignore_index=2)

    stated = WeightedLoss(loss, lambda _, batch: (batch["labels"] != 2).sum())
    batch = {"x": problem.inputs, "labels": problem.targets}
    check(noise_scale(problem.model, stated, batch, parts=7).simple, parts.simple)


CURVATURE = symmetric([6.0, 4.0, 2.0, *torch.linspace(0.2, 1, 5).tolist()])


class Point(nn.Module):
    """Weights that the loss compares with examples: gradients A (w - x), Hessian A."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.full((8,), 0.6, dtype=torch.float64))

    def forward(self, inputs):
        apart = self.weights - inputs
        return (apart @ CURVATURE * apart).sum(1) / 2


def mean_of(outputs, _targets):
    return outputs.mean()


@pytest.mark.slow
@pytest.mark.parametrize("preconditioned", [False, True])
def test_unbiased_and_covered_on_a_quadratic_with_known_covariance(preconditioned):
    root = symmetric(torch.linspace(0.3, 1.5, 8).tolist(), seed=2)
    factors = torch.ones(8, dtype=torch.float64)
    if preconditioned:
        factors = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    model = Point()
    spread = factors[:, None] * CURVATURE @ root  # of the update of one example
    mean = factors * (CURVATURE @ model.weights.detach())
    noise = float((spread.T @ CURVATURE @ spread).trace())
    signal = float(mean @ CURVATURE @ mean)
    found = []
    for seed in range(120):
        source = torch.Generator().manual_seed(seed)
        inputs = torch.randn(320, 8, generator=source, dtype=torch.float64) @ root
        scale = noise_scale(model, mean_of, (inputs, torch.zeros(320)), parts=16, update=[factors])
        found.append(scale.with_curvature)
    for name, exact in (("numerator", noise), ("denominator", signal)):
        values = torch.tensor([getattr(e, name) for e in found], dtype=torch.float64)
        assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / len(found) ** 0.5
    covered = [abs(e.value - noise / signal) <= 2 * e.stderr for e in found]
    assert 0.88 <= sum(covered) / len(covered) <= 0.99
    assert all(e.is_known for e in found)


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
def test_nothing_about_the_model_changes(norm_mode):
    problem = classification(conv_net(), (1, 8, 8), 40)
    problem.model.train()
    problem.model[0].weight.grad = torch.ones_like(problem.model[0].weight)
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = noise_scale(problem.model, problem.loss_fn, problem.pair, parts=5, norm_mode=norm_mode)
    assert found.num_parts == 5
    after = problem.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in problem.model.modules())
    assert torch.equal(problem.model[0].weight.grad, torch.ones_like(problem.model[0].weight))
    assert all(p.grad is None for p in list(problem.model.parameters())[1:])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()


def test_no_graph_of_a_part_waits_for_a_collection():
    """Memory would grow with the number of parts."""
    problem = small()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(one) is Kept for one in gc.get_objects())
        noise_scale(problem.model, problem.loss_fn, problem.pair, parts=6)
        after = sum(type(one) is Kept for one in gc.get_objects())
    finally:
        gc.enable()
    assert after <= before


def test_float32_is_close_to_float64():
    problem = small()
    exact = noise_scale(problem.model, problem.loss_fn, problem.pair, parts=6).with_curvature
    pair = problem.inputs.float(), problem.targets
    found = noise_scale(problem.model.float(), problem.loss_fn, pair, parts=6).with_curvature
    assert found.numerator == pytest.approx(exact.numerator, rel=1e-4)
    assert found.denominator == pytest.approx(exact.denominator, rel=1e-4)


def pairs_of(problem, count):
    return list(zip(problem.inputs.chunk(count), problem.targets.chunk(count), strict=True))


class Shuffling:
    """Batches that another pass cuts elsewhere."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        self.pairs = self.pairs[1:] + self.pairs[:1]
        return iter(self.pairs)


class Shrinking(Shuffling):
    def __iter__(self):
        self.pairs = self.pairs[:-1]
        return iter(self.pairs)


BAD = {
    "at least 4 parts": lambda p: {"data": pairs_of(p, 3)},
    "parts must be a whole number >= 4": lambda p: {"parts": 3},
    "each of them is a part": lambda p: {"data": pairs_of(p, 6), "parts": 6},
    "changed between two passes": lambda p: {"data": Shuffling(pairs_of(p, 6))},
    "neither shuffles": lambda p: {"data": Shrinking(pairs_of(p, 8))},
    "a tensor for each of the 4 parameters, got 1": lambda p: {"update": [torch.ones(3)]},
    "update number 1 must have the shape": lambda p: {"update": lambda g: [g[0], *g[:3]]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message):
    problem = small()
    given = {"data": problem.pair} | BAD[message](problem)
    with pytest.raises(HessianFlowError, match=message) as caught:
        noise_scale(problem.model, problem.loss_fn, given.pop("data"), **given)
    assert "\n" not in str(caught.value)


def test_an_update_that_is_not_finite_is_refused():
    problem = small()
    bad = [torch.full_like(p, math.nan) for p in problem.model.parameters()]
    with pytest.raises(NonFiniteError, match="not finite"):
        noise_scale(problem.model, problem.loss_fn, problem.pair, update=bad, parts=6)


def test_the_simple_form_is_that_of_the_whole_without_products() -> None:
    problem = classification(mlp((5, 8, 4)), (5,), 64, 4)
    both = noise_scale(problem.model, problem.loss_fn, problem.pair, parts=8)
    simple = noise_scale(problem.model, problem.loss_fn, problem.pair, parts=8, form="simple")
    assert simple.simple == both.simple
    assert simple.matvecs == 0
    assert not simple.with_curvature.is_known
    assert math.isnan(simple.with_curvature.value)
    with pytest.raises(HessianFlowError, match="form must be"):
        noise_scale(problem.model, problem.loss_fn, problem.pair, form="forward")
