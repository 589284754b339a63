"""The edge of every optimizer: where its own steps diverge on a quadratic, and what is said of it.

The oracle is the optimizer itself. It steps twice from nearby weights on a quadratic: 1 % below the
stated edge the two come together, 1 % above it they part.
"""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from problems import operator_of, symmetric
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import Optimizer

from hessianflow.curvature import (
    CallableOperator,
    PreconditionedOperator,
    optimizer_geometry,
    top_eigenpairs,
)
from hessianflow.curvature.geometry_rules import RULES, WRAPPERS
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import CLARS, LAMB, LARS, SAM, Extrapolation, MicrobatchNorms

STILL = 1 - 1e-15
"""A decay rate under which a second moment does not move."""
SPECTRUM = [10.0, 6.0, 3.0, 1.0, 0.5, 0.2]
SLOPE = 1e3
"""The gradient of the flat direction, which keeps the ratios of layers and norms where they are."""


class Quadratic:
    """L(w) = (w - c) H (w - c) / 2, with a slope in a further, flat direction of each weight.

    Args:
        shapes: of the weights; the first entry of each is its flat direction.
        scale: of H.
        decay: weight decay whose pull at c a constant force undoes, so that weights stay there.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], scale: float = 1.0, decay: float = 0.0
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        source = torch.Generator().manual_seed(1)
        matrix = symmetric(SPECTRUM, 3) * scale
        self.matrix = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        curved = [i for i in range(sum(sizes)) if i not in starts]
        self.matrix[torch.tensor(curved)[:, None], torch.tensor(curved)] = matrix
        self.centre = 10 + torch.rand(sum(sizes), generator=source, dtype=torch.float64)
        self.flat = starts[:-1]
        self.centre[self.flat] = 0.0
        self.slope = -decay * self.centre
        self.slope[self.flat] = SLOPE
        self.shapes = list(shapes)

    def weights(self, distance: float, seed: int = 0) -> list[nn.Parameter]:
        source = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.centre.shape, generator=source, dtype=torch.float64)
        noise[self.flat] = 0.0  # a distance along the flat directions would stay
        pieces = torch.split(self.centre + distance * noise, [math.prod(s) for s in self.shapes])
        return [nn.Parameter(p.view(s)) for p, s in zip(pieces, self.shapes, strict=True)]

    def fill(self, weights: Sequence[nn.Parameter]) -> float:
        flat = torch.cat([w.detach().reshape(-1) for w in weights])
        gradient = self.matrix @ (flat - self.centre) + self.slope
        sizes = [w.numel() for w in weights]
        for weight, piece in zip(weights, torch.split(gradient, sizes), strict=True):
            weight.grad = piece.view(weight.shape).clone()
        return float(gradient @ gradient)


Make = Callable[[list[nn.Parameter], float], Optimizer]


def with_moments(optimizer: Optimizer, quadratic: Quadratic) -> Optimizer:
    """Give the optimizer second moments that stay, and the first moment of the slope."""
    source = torch.Generator().manual_seed(2)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            moment = 0.5 + torch.rand(weight.shape, generator=source, dtype=torch.float64)
            first = torch.zeros_like(moment)
            first.view(-1)[0] = SLOPE
            state = optimizer.state[weight]
            state["step"] = torch.tensor(1e16)
            state["exp_avg"] = first
            for name in ("exp_avg_sq", "square_avg"):
                state[name] = moment.clone()
            state["max_exp_avg_sq"] = 2 * moment
            state["grad_avg"] = 0.5 * moment
            if group.get("momentum"):
                state["momentum_buffer"] = torch.zeros_like(moment)
    return optimizer


def share_of(optimizer: Optimizer, quadratic: Quadratic) -> float:
    geometry = optimizer_geometry(optimizer)
    assert geometry.linear, geometry.note
    operator = PreconditionedOperator(operator_of(quadratic.matrix), geometry)
    return geometry.edge_share(float(torch.linalg.eigvalsh(operator.dense())[-1]))


def start(
    make: Make, quadratic: Quadratic, share: float, distance: float, seed: int = 0
) -> tuple[Optimizer, list[nn.Parameter]]:
    """Return an optimizer whose rates use this share of the edge. All rates have one factor."""
    factor = 1.0
    for _ in range(8):  # the threshold under decoupled decay depends on the rate
        weights = quadratic.weights(distance, seed)
        optimizer = with_moments(make(weights, factor), quadratic)
        quadratic.fill(weights)
        factor *= share / share_of(optimizer, quadratic)
    return optimizer, weights


def growth(make: Make, quadratic: Quadratic, share: float, steps: int, distance: float) -> float:
    """Return how many times further apart two nearby runs are after some steps."""
    optimizer, weights = start(make, quadratic, share, 0.0)
    other, others = start(make, quadratic, share, distance)
    for mine, its in zip(optimizer.param_groups, other.param_groups, strict=True):
        mine["lr"] = its["lr"]

    def apart() -> float:
        pairs = zip(weights, others, strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    before = apart()
    for _ in range(steps):
        for stepped, tensors in ((optimizer, weights), (other, others)):
            if isinstance(stepped, (SAM, Extrapolation)):
                stepped.step(lambda tensors=tensors: quadratic.fill(tensors))
            else:
                quadratic.fill(tensors)
                stepped.step()
        if apart() > 1e3 * before:
            break
    return apart() / before


def assert_edge(
    make: Make, quadratic: Quadratic, distance: float = 1e-3, at: float = 1.0, steps: int = 600
) -> None:
    assert growth(make, quadratic, 0.99 * at, steps, distance) < 0.1
    assert growth(make, quadratic, 1.01 * at, steps, distance) > 10


def groups(weights: Sequence[nn.Parameter], rate: float, **second: Any) -> list[dict[str, Any]]:
    second = {name: value for name, value in second.items() if name != "factor"} | {
        "lr": rate * second.get("factor", 1.0)
    }
    return [{"params": [weights[0]], "lr": rate}, {"params": list(weights[1:]), **second}]


VECTORS: dict[str, Make] = {
    "sgd": lambda w, lr: SGD(w, lr=lr),
    "sgd, dampening without momentum": lambda w, lr: SGD(w, lr=lr, dampening=0.5),
    "heavy ball": lambda w, lr: SGD(w, lr=lr, momentum=0.9),
    "heavy ball, dampening": lambda w, lr: SGD(w, lr=lr, momentum=0.7, dampening=0.4),
    "nesterov": lambda w, lr: SGD(w, lr=lr, momentum=0.9, nesterov=True),
    "nesterov, decay": lambda w, lr: SGD(w, lr, momentum=0.5, nesterov=True, weight_decay=2.0),
    "sgd, decay": lambda w, lr: SGD(w, lr=lr, momentum=0.9, weight_decay=3.0),
    "sgd, rates of groups": lambda w, lr: SGD(groups(w, lr, factor=7.0), lr, momentum=0.9),
    "sgd, decay of one group": lambda w, lr: SGD(groups(w, lr, weight_decay=8.0), lr, momentum=0.9),
    "sgd, momenta of groups": lambda w, lr: SGD(groups(w, lr, momentum=0.3), lr, momentum=0.9),
    "adam": lambda w, lr: Adam(w, lr, betas=(0.9, STILL)),
    "adam, eps": lambda w, lr: Adam(w, lr, betas=(0.8, STILL), eps=0.5),
    "adam, decay": lambda w, lr: Adam(w, lr, betas=(0.9, STILL), weight_decay=4.0),
    "amsgrad": lambda w, lr: Adam(w, lr, betas=(0.9, STILL), amsgrad=True),
    "adamw": lambda w, lr: AdamW(w, lr, betas=(0.9, STILL), weight_decay=0.1),
    "adamw, betas of groups": lambda w, lr: AdamW(
        groups(w, lr, betas=(0.5, STILL), factor=0.3), lr, betas=(0.9, STILL)
    ),
    "rmsprop": lambda w, lr: RMSprop(w, lr, alpha=STILL),
    "rmsprop, momentum": lambda w, lr: RMSprop(w, lr, alpha=STILL, momentum=0.9, eps=0.1),
    "rmsprop, centred": lambda w, lr: RMSprop(w, lr, alpha=STILL, centered=True, weight_decay=1.0),
}


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_steps_diverge_at_the_threshold(make: Make) -> None:
    assert_edge(make, Quadratic([(4,), (2, 2)]))


TRUST = 50.0
"""Makes the ratios about 1, so that layers with a ratio and those without move alike."""


def clars(weights: list[nn.Parameter], rate: float) -> CLARS:
    norms = MicrobatchNorms(weights)
    gradients = [torch.full_like(weight.detach(), SLOPE) for weight in weights]
    norms.on_microbatch(gradients, 8)
    norms.on_step(gradients, 8)
    return CLARS(weights, rate, momentum=0.9, norms=norms, trust_coefficient=TRUST, max_rate=None)


LAYERS: dict[str, Make] = {
    "lars": lambda w, lr: LARS(w, lr, trust_coefficient=TRUST, momentum=0.9),
    "lars, nesterov": lambda w, lr: LARS(
        w, lr, trust_coefficient=TRUST, momentum=0.9, nesterov=True, form="outside"
    ),
    "lars, late, without momentum": lambda w, lr: LARS(
        w, lr, trust_coefficient=TRUST, momentum=0.0, form="late"
    ),
    "larc": lambda w, lr: LARS(w, lr, momentum=0.9, form="larc", trust_coefficient=1e9),
    "clars": clars,
    "lamb": lambda w, lr: LAMB(w, lr, betas=(0.9, STILL)),
    "lamb, vectors": lambda w, lr: LAMB(w, lr, betas=(0.8, STILL), adapt_vectors=True),
    "lamb, decay": lambda w, lr: LAMB(w, lr, betas=(0.9, STILL), weight_decay=0.01),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_steps_with_layer_ratios_diverge_at_the_threshold(make: Make) -> None:
    assert_edge(make, Quadratic([(4,), (2, 2)], 1e8), 3e-11)


def test_decay_under_layer_ratios_is_added_to_the_matrix() -> None:
    decay = 1e8

    def make(weights: list[nn.Parameter], rate: float) -> LARS:
        options = {"weight_decay": decay, "decay_vectors": True, "trust_coefficient": 2 * decay}
        return LARS(weights, rate, momentum=0.9, **options)

    assert_edge(make, Quadratic([(4,), (2, 2)], 1e8, decay), 3e-11)


def test_steps_of_sam_diverge_at_the_edge_of_the_base_and_what_is_noted_of_it() -> None:
    quadratic = Quadratic([(8 - 1,)])
    base = SGD(quadratic.weights(0.0), lr=0.1, momentum=0.9)
    assert optimizer_geometry(SAM(base, rho=0.05)).name == "SAM(SGD)"

    def make(rho: float) -> Make:
        return lambda w, lr: SAM(SGD(w, lr=lr, momentum=0.9), rho=rho)

    assert_edge(make(0.05), quadratic, 1e-6)
    # rho lambda / |g| = 0.1
    assert_edge(make(0.1 * SLOPE / 10), quadratic, 1e-6, at=1 / 1.1)


def test_a_look_ahead_moves_the_edge_as_noted() -> None:
    def make(lookahead: float) -> Make:
        return lambda w, lr: Extrapolation(SGD(w, lr=lr, momentum=0.9), lookahead)

    assert_edge(make(1e-5), Quadratic([(7,)]))
    assert_edge(make(0.02), Quadratic([(7,)]), at=1 / (1 - 0.02 * 10))


def test_the_parts_of_a_geometry() -> None:
    first, second = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3,)))
    optimizer = SGD([{"params": [first]}, {"params": [second], "lr": 0.4}], 0.1, momentum=0.5)
    geometry = optimizer_geometry(optimizer)
    assert (geometry.name, geometry.linear, geometry.note) == ("SGD", True, "")
    assert (geometry.rate, geometry.rates) == (0.1, (0.1, 0.4))
    assert geometry.threshold == pytest.approx(3.0)
    assert geometry.preconditioner(first) is None
    assert geometry.preconditioner(second).tolist() == pytest.approx([0.25] * 3)
    assert geometry.edge_share(15.0) == pytest.approx(0.5)


def test_adams_preconditioner_is_the_root_of_its_unbiased_moment() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    adam = Adam([weight], lr=0.1, eps=0.5)
    weight.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    adam.step()
    adam.step()
    found = optimizer_geometry(adam).preconditioner(weight)
    torch.testing.assert_close(found, torch.tensor([3.5, 4.5], dtype=torch.float64))


def test_vectors_map_back_to_eigenvectors_of_the_unsymmetric_matrix() -> None:
    matrix = symmetric([5.0, 2.0, -1.0, 0.3])
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    adam = Adam([weight], weight_decay=0.2)
    weight.grad = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    adam.step()
    geometry = optimizer_geometry(adam)
    operator = PreconditionedOperator(operator_of(matrix), geometry)
    pair = top_eigenpairs(operator, which="LA", tol=1e-10)
    vector = operator.to_weights(pair.vectors[:, 0])
    unsymmetric = (matrix + 0.2 * torch.eye(4)) / geometry.preconditioner(weight)[:, None]
    torch.testing.assert_close(unsymmetric @ vector, pair.values * vector, rtol=1e-6, atol=1e-8)
    assert operator.size == 4
    assert operator.dtype == torch.float64
    assert operator.device == torch.device("cpu")
    assert float(pair.values[0]) == pytest.approx(
        float(torch.linalg.eigvals(unsymmetric).real.max())
    )


class Halved(SGD):
    """A step of its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] /= 2
        return super().step(closure)


class Renamed(SGD):
    """Only another name."""


class Signs(Optimizer):
    """Unknown."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        del closure
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.sub_(weight.grad.sign())


@pytest.mark.parametrize("kind", [Halved, Signs], ids=["own step", "unknown"])
def test_an_unknown_optimizer_falls_back_and_says_so(kind: Any) -> None:
    weight = nn.Parameter(torch.ones(2))
    geometry = optimizer_geometry(kind([weight]))
    assert not geometry.linear
    assert "no known preconditioner" in geometry.note
    assert geometry.threshold == 2
    operator = CallableOperator(lambda v: v, 2)
    with pytest.raises(HessianFlowError, match="along its update; use critical_rate"):
        PreconditionedOperator(operator, geometry)


def test_groups_without_a_rate_are_stepped_by_multiples() -> None:
    geometry = optimizer_geometry(Signs([nn.Parameter(torch.ones(2))]))
    assert (geometry.rate, geometry.rates) == (1.0, (1.0,))


def test_a_subclass_with_the_same_step_is_known_whichever_was_made_first() -> None:
    geometry = optimizer_geometry(Renamed([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9))
    assert geometry.linear
    assert geometry.name == "Renamed"
    assert geometry.threshold == pytest.approx(3.8)


def test_before_its_first_step_adam_has_no_preconditioner() -> None:
    weight = nn.Parameter(torch.ones(2))
    for optimizer in (Adam([weight]), RMSprop([weight]), LAMB([weight], 0.1)):
        geometry = optimizer_geometry(optimizer)
        assert not geometry.linear
        assert "has not stepped" in geometry.note
        assert not optimizer.state  # looking leaves no empty states behind
    matrix = nn.Parameter(torch.ones(2, 2))
    for optimizer in (LARS([matrix], 0.1), CLARS([matrix], 0.1)):
        geometry = optimizer_geometry(optimizer)
        assert not geometry.linear
        assert "no gradients" in geometry.note
    matrix.grad = torch.ones(2, 2)
    assert "no gradients" in optimizer_geometry(CLARS([matrix], 0.1)).note  # no norms


def test_a_first_step_that_a_scaler_skipped_leaves_adam_without_a_preconditioner() -> None:
    """The fused step makes its state before it looks at the scaler's finding."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.step(optimizer)
    assert optimizer.state[weight]["step"] == 0
    geometry = optimizer_geometry(optimizer)
    assert not geometry.linear
    assert "Adam has no moments" in geometry.note


def test_an_optimizer_that_climbs_has_no_edge_downhill() -> None:
    geometry = optimizer_geometry(SGD([nn.Parameter(torch.ones(2))], lr=0.1, maximize=True))
    assert "maximizes" in geometry.note


def test_frozen_and_foreign_parameters_do_not_move() -> None:
    trained, frozen, foreign = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    geometry = optimizer_geometry(SGD([trained, frozen], lr=0.1))
    assert geometry.parameters == (trained,)
    operator = PreconditionedOperator(
        CallableOperator(lambda v: 3 * v, 4), geometry, [trained, foreign]
    )
    assert (operator @ torch.ones(4)).tolist() == [3, 3, 0, 0]


def test_groups_without_a_rate_do_not_move_but_no_group_at_all_is_no_edge() -> None:
    first, second = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([{"params": [first], "lr": 0.0}, {"params": [second]}], lr=0.2)
    geometry = optimizer_geometry(optimizer)
    assert geometry.rate == 0.2
    assert geometry.inverse(first) == 0
    optimizer.param_groups[1]["lr"] = 0.0
    geometry = optimizer_geometry(optimizer)
    assert geometry.rate == 0
    assert geometry.edge_share(1e9) == 0


def test_a_rate_that_is_not_a_number_shows() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = math.nan
    assert math.isnan(optimizer_geometry(optimizer).edge_share(1.0))


def test_decay_beyond_its_own_edge_uses_all_of_the_threshold() -> None:
    weight = nn.Parameter(torch.ones(1))
    adam = AdamW([weight], lr=1.0, weight_decay=3.0)
    weight.grad = torch.ones(1)
    adam.step()
    assert optimizer_geometry(adam).edge_share(1e-2) > 1


def test_a_rate_in_a_tensor_and_weights_of_16_bits() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    adam = Adam([weight], lr=torch.tensor(0.1), foreach=False)
    weight.grad = torch.ones(2, dtype=torch.bfloat16)
    adam.step()
    geometry = optimizer_geometry(adam)
    assert geometry.rate == pytest.approx(0.1)
    assert geometry.preconditioner(weight).dtype == torch.float32


def test_clars_counts_nothing_when_it_is_looked_at() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = clars([weight], 0.1)
    optimizer.max_rate = 1e-9
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer_geometry(optimizer)
    assert optimizer._tally is not None
    assert optimizer._tally.tolist() == [1, 1]


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(HessianFlowError, match=r"must be a torch.optim.Optimizer, got a float"):
        optimizer_geometry(0.1)  # type: ignore[arg-type]


def test_an_operator_of_another_size_is_refused() -> None:
    geometry = optimizer_geometry(SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(HessianFlowError, match="3 rows, but the parameters have 2 weights"):
        PreconditionedOperator(CallableOperator(lambda v: v, 3), geometry)


@pytest.mark.parametrize("name", [*RULES, *WRAPPERS])
def test_every_name_of_the_tables_is_a_class(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert issubclass(vars(import_module(module))[kind], Optimizer)


def test_a_preconditioned_product_frees_the_graph_below() -> None:
    class Kept(CallableOperator):
        released = False

        def release(self) -> None:
            self.released = True

    base = Kept(lambda v: v, 2)
    PreconditionedOperator(
        base, optimizer_geometry(SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    ).release()
    assert base.released
