"""The critical rate along an optimizer's own update: closed forms, cost, and no trace."""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import classification, conv_net, mlp, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from hessianflow.curvature import HessianOperator, NonFiniteError, critical_rate
from hessianflow.curvature.crossing import crossing
from hessianflow.curvature.displacement import BY_TENSOR, displacement
from hessianflow.interfaces import HessianFlowError
from hessianflow.models.catalogue import create
from hessianflow.optim import LAMB, LARS, SAM, Muon, muon_groups

FORMS = ("product", "forward")


class Quadratic(nn.Module):
    """A model whose loss is w H w / 2 whatever the batch."""

    def __init__(self, spectrum: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = torch.diag(torch.tensor(spectrum, dtype=dtype))
        source = torch.Generator().manual_seed(0)
        size = len(spectrum)
        self.first = nn.Parameter(torch.randn(2, 1, generator=source, dtype=dtype))
        self.second = nn.Parameter(torch.randn(size - 2, generator=source, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        w = torch.cat([self.first.view(-1), self.second])
        return (w @ self.matrix @ w / 2).expand(len(inputs))

    def flat(self) -> Tensor:
        return torch.cat([self.first.view(-1), self.second]).detach()


BATCH = torch.zeros(3, 1), torch.zeros(3)


def itself(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets
    return outputs.mean()


class Signs(Optimizer):
    """An optimizer without a preconditioner, which also writes to its gradients and draws."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.counts: list[int] = []

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        self.counts.append(1)
        torch.rand(1)
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad.sign_()
                        self.state[weight]["last"] = weight.grad.clone()
                        weight.sub_(weight.grad, alpha=group["lr"])


Make = Callable[[Any], Optimizer]
MAKERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, momentum=0.9),
    "lars": lambda p: LARS(p, 0.1),
    "lamb": lambda p: LAMB(p, 0.01, max_grad_norm=1.0),
    "signs": lambda p: Signs(p, 0.01),
    "sam": lambda p: SAM(SGD(p, lr=0.01, momentum=0.9), rho=0.0),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.01),
}


def step(model: nn.Module, optimizer: Optimizer, loss_fn: Any, batch: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_is_that_of_the_closed_form_along_the_step_that_follows(make: Make, steps: int) -> None:
    """The oracle steps the optimizer itself, and has the Hessian as a matrix."""
    model = Quadratic([1.0, 3.0, 0.5, 2.0, 0.1])
    optimizer = make(list(model.parameters()))
    for _ in range(steps):
        step(model, optimizer, itself, BATCH)
    found = {form: critical_rate(model, itself, BATCH, optimizer, form=form) for form in FORMS}
    before = model.flat()
    step(model, optimizer, itself, BATCH)
    moved = before - model.flat()
    slope = float(moved @ model.matrix @ before)
    curvature = float(moved @ model.matrix @ moved)
    for form, result in found.items():
        assert result.slope == pytest.approx(slope, rel=1e-4), form  # Muon rounds to bfloat16
        expected = 2 * slope / curvature * optimizer.param_groups[0]["lr"]
        if slope <= 0:
            assert (result.critical, result.note) == (0, "the update climbs")
            continue
        assert result.critical == pytest.approx(expected, rel=0.011), form
        assert result.local == pytest.approx(expected, rel=1e-4), form
        assert result.edge_share == pytest.approx(result.rate / result.critical)


def test_for_gradient_descent_the_sharpness_is_the_rayleigh_quotient() -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    found = critical_rate(model, itself, BATCH, SGD(model.parameters(), lr=0.1))
    gradient = model.matrix @ model.flat()
    quotient = gradient @ model.matrix @ gradient / (gradient @ gradient)
    assert found.sharpness == pytest.approx(float(quotient))
    assert found.best == found.critical / 2


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    kept = [p.detach().clone() for p in model.parameters()]
    kept += [b.clone() for b in model.buffers()]
    kept += [copy.deepcopy(p.grad) for p in model.parameters()]
    return [*kept, copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_measuring_leaves_no_trace(make: Make, form: Any) -> None:
    problem = classification(conv_net(), (1, 8, 8), 16)
    model = problem.model.train()
    optimizer = make(list(model.parameters()))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    if not isinstance(optimizer, torch.optim.Muon):
        step(model, optimizer, problem.loss_fn, problem.pair)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, seen = state_of(model, optimizer), list(calls)
    critical_rate(model, problem.loss_fn, problem.pair, optimizer, form=form)
    assert same(before, state_of(model, optimizer))
    assert calls == seen
    assert all(m.training for m in model.modules())
    assert not getattr(optimizer, "_opt_called", False) or seen


def test_what_an_optimizer_holds_beside_its_state_is_not_touched() -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    optimizer = Signs(model.parameters(), 0.01)
    critical_rate(model, itself, BATCH, optimizer)
    assert optimizer.counts == []
    assert not optimizer.state


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts = {"forward": 0, "backward": 0}
    original = torch.autograd.grad

    def grad(*args: Any, **options: Any) -> Any:
        counts["backward"] += 1
        return original(*args, **options)

    def forwarded(*_: Any) -> None:
        counts["forward"] += 1

    monkeypatch.setattr(torch.autograd, "grad", grad)
    model.register_forward_pre_hook(forwarded)
    return counts


def test_the_product_form_costs_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient comes with the graph of the product, so nothing is computed twice."""
    problem = classification(mlp(), (20,), 16)
    counts = counted(problem.model, monkeypatch)
    operator = HessianOperator(
        problem.model, problem.loss_fn, problem.pair, check_deterministic=False
    )
    operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
    product = dict(counts)
    optimizer = Adam(problem.model.parameters())
    found = critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer)
    assert {name: counts[name] - product[name] for name in counts} == product
    assert (found.products, found.passes) == (1, 0)


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 2.5, 40.0])
def test_the_forward_form_takes_at_most_ten_passes(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    problem = classification(mlp(dtype=torch.float32), (20,), 64)
    train(problem, 10)
    optimizer = SGD(problem.model.parameters(), lr=1.0)
    optimizer.param_groups[0]["lr"] = (
        share * critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer).critical
    )
    gradient_at = HessianOperator(problem.model, problem.loss_fn, problem.pair).gradient()
    for parameter, piece in zip(
        problem.model.parameters(),
        torch.split(gradient_at, [p.numel() for p in problem.model.parameters()]),
        strict=True,
    ):
        parameter.grad = piece.view(parameter.shape)
    counts = counted(problem.model, monkeypatch)
    found = critical_rate(
        problem.model, problem.loss_fn, problem.pair, optimizer, form="forward", use_grad=True
    )
    assert counts["backward"] == 0
    assert counts["forward"] == found.passes <= 10
    # What it finds is where the loss is back.
    with torch.no_grad():
        before = float(problem.loss_fn(problem.model(problem.inputs), problem.targets))
        for parameter in problem.model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=found.critical)
        after = float(problem.loss_fn(problem.model(problem.inputs), problem.targets))
    fall = found.critical * float(gradient_at @ gradient_at)
    assert abs(after - before) < 0.03 * fall


class Live(TorchDispatchMode):
    """Keeps the peak of the bytes in tensors that were made within it and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.tensors.append(weakref.ref(tensor))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.tensors = [held for held in self.tensors if held() is not None]
        storages = [t.untyped_storage() for held in self.tensors if (t := held()) is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Many(nn.Module):
    """A loss without activations to speak of, over many weights of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2000)) for _ in range(40)])

    def forward(self, inputs: Tensor) -> Tensor:
        total = torch.stack([weight.square().sum() for weight in self.weights]).sum()
        return total.expand(len(inputs))


@pytest.mark.parametrize("form", FORMS)
def test_it_takes_one_gradient_of_memory_more_than_what_it_does_without(form: Any) -> None:
    model = Many()
    optimizer = Adam(model.parameters())
    step(model, optimizer, itself, BATCH)
    optimizer.zero_grad()
    operator = HessianOperator(model, itself, BATCH, check_deterministic=False)
    vector = torch.ones(operator.size)
    with Live() as plain:
        if form == "product":
            operator.matvec(vector)
        else:
            operator.gradient()
    operator.release()
    with Live() as measured:
        critical_rate(model, itself, BATCH, optimizer, form=form)
    gradient = 4 * operator.size
    assert measured.peak <= plain.peak + 1.25 * gradient  # and a few tensors of 40


def test_the_forms_agree_on_a_new_resnet_in_batch_statistics() -> None:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = create("resnet8")
    torch.random.set_rng_state(generator)
    problem = classification(net, (3, 32, 32), 64)
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        one, two = (
            critical_rate(net, problem.loss_fn, problem.pair, optimizer, form=form)
            for form in ("product", "forward")
        )
        assert one.local == one.critical
        assert two.local == pytest.approx(one.critical, rel=0.05)
        step(net.train(), optimizer, problem.loss_fn, problem.pair)


def test_running_statistics_are_another_function() -> None:
    problem = classification(conv_net(), (1, 8, 8), 16)
    optimizer = SGD(problem.model.parameters(), lr=0.1)
    rates = {
        mode: critical_rate(
            problem.model, problem.loss_fn, problem.pair, optimizer, norm_mode=mode
        ).critical
        for mode in ("batch", "eval")
    }
    assert rates["batch"] != rates["eval"]


def test_microbatches_and_frozen_weights() -> None:
    problem = classification(mlp(), (20,), 16)
    optimizer = Adam(problem.model.parameters())
    frozen = next(iter(problem.model.parameters()))
    frozen.requires_grad_(False)
    whole = critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer)
    cut = critical_rate(problem.model, problem.loss_fn, problem.pair, optimizer, microbatch_size=5)
    assert cut.critical == pytest.approx(whole.critical, rel=1e-9)


def test_the_gradients_at_hand_are_stepped_with() -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(HessianFlowError, match="none has one: call backward"):
        critical_rate(model, itself, BATCH, optimizer, use_grad=True)
    model.second.grad = torch.tensor([0.0, -1.0], dtype=torch.float64)
    found = critical_rate(model, itself, BATCH, optimizer, use_grad=True)
    assert found.curvature == pytest.approx(0.01 * 2.0)


def test_an_update_of_zero_says_so() -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    for optimizer in (SGD(model.parameters(), lr=0.0), SGD([nn.Parameter(torch.ones(1))], lr=0.1)):
        for form in FORMS:
            found = critical_rate(model, itself, BATCH, optimizer, form=form)  # type: ignore[arg-type]
            assert math.isnan(found.critical)
            assert found.note == "the update is zero"


def tanh_net(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
    return model, (torch.randn(128, 10).to(dtype), torch.randint(0, 3, (128,)))


@pytest.mark.parametrize("lr", [1.0, 1e-2, 1e-4])
def test_a_rate_far_below_the_critical_one_tells_as_much(lr: float) -> None:
    """Muon's critical rate here is 120,000 times the last of these, beyond five tenfold steps."""
    model, batch = tanh_net(torch.float32)
    optimizer = Muon(muon_groups(model), lr)
    by_product, by_passes = (
        critical_rate(model, nn.CrossEntropyLoss(), batch, optimizer, form=form)  # type: ignore[arg-type]
        for form in FORMS
    )
    assert by_passes.passes <= 10
    assert by_passes.critical == pytest.approx(11.95, rel=0.01)
    assert by_passes.local == pytest.approx(by_product.critical, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_not_taken_to_stand_still(dtype: torch.dtype) -> None:
    """A step smaller than their rounding changes no loss, which is no sign of a critical rate."""
    model, batch = tanh_net(torch.float32)
    true = critical_rate(
        model, nn.CrossEntropyLoss(), batch, SGD(model.parameters(), 0.1), form="forward"
    )
    model, batch = tanh_net(dtype)
    for lr in (0.1, 1.0):
        optimizer = SGD(model.parameters(), lr)
        found = critical_rate(model, nn.CrossEntropyLoss(), batch, optimizer, form="forward")
        assert found.critical == pytest.approx(true.critical, rel=0.25)
        assert found.local == pytest.approx(true.local, rel=0.5)
        assert all(parameter.dtype == dtype for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_the_caller_can_still_be_differentiated(form: str) -> None:
    model, batch = tanh_net(torch.float32)
    optimizer = SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    expected = torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), list(model.parameters()))
    loss = loss_fn(model(batch[0]), batch[1])
    critical_rate(model, loss_fn, batch, optimizer, form=form)  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_a_small_displacement_of_weights_of_16_bits_has_a_product() -> None:
    model, batch = tanh_net(torch.float16)
    found = critical_rate(model, nn.CrossEntropyLoss(), batch, SGD(model.parameters(), 1e-4))
    assert 0 < found.critical < math.inf
    assert found.curvature > 0


def test_negative_curvature_has_no_critical_rate() -> None:
    model = Quadratic([-1.0, -1.0, -1.0, -1.0])
    optimizer = SGD(model.parameters(), lr=0.1)
    for form in FORMS:
        found = critical_rate(model, itself, BATCH, optimizer, form=form)  # type: ignore[arg-type]
        assert found.critical == math.inf
        assert found.edge_share == 0
        assert found.note == "the loss only falls along the update"


def test_what_is_not_finite_says_so() -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    optimizer = Adam(model.parameters(), lr=0.1)
    step(model, optimizer, itself, BATCH)
    optimizer.state[model.second]["exp_avg"].fill_(math.nan)
    found = critical_rate(model, itself, BATCH, optimizer)
    assert math.isnan(found.critical)
    assert found.note == "the update is not finite"
    with torch.no_grad():
        model.first.fill_(math.inf)
    for form in FORMS:
        with pytest.raises(NonFiniteError, match="not finite"):
            critical_rate(model, itself, BATCH, optimizer, form=form)  # type: ignore[arg-type]


def test_a_loss_that_overflows_far_out_bounds_the_rate() -> None:
    class Steep(Quadratic):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            return outputs + torch.where(outputs > 10, math.inf, 0.0)

    model = Steep([1.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = SGD(model.parameters(), lr=50.0)
    found = critical_rate(model, itself, BATCH, optimizer, form="forward")
    assert found.critical == pytest.approx(2.0, rel=0.05)


class Closing(Optimizer):
    """Needs a closure."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class Broken(Signs):
    """Cannot step."""

    def step(self, closure: Any = None) -> None:
        del closure
        raise RuntimeError("no device")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Closing, "computes gradients within its step"),
        (lambda p: Broken(p, 0.1), "Broken cannot step.*RuntimeError: no device"),
    ],
)
def test_optimizers_that_cannot_be_stepped_are_refused(make: Any, message: str) -> None:
    model = Quadratic([1.0, 3.0, 0.5, 2.0])
    with pytest.raises(HessianFlowError, match=message):
        critical_rate(model, itself, BATCH, make(list(model.parameters())))


def test_a_copy_that_moves_the_weights_themselves_is_found_out() -> None:
    weight = nn.Parameter(torch.ones(2))

    class Outside(Signs):
        def step(self, closure: Any = None) -> None:
            del closure
            with torch.no_grad():
                weight.add_(0.0)

    with pytest.raises(HessianFlowError, match="moved the weights themselves"):
        displacement(Outside([weight], 0.1), [weight], torch.ones(2))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_one_tensor_at_a_time_is_the_whole_step(make: Make, monkeypatch: Any) -> None:
    problem = classification(conv_net(), (1, 8, 8), 16)
    parameters = list(problem.model.parameters())
    optimizer = make(parameters)
    if not isinstance(optimizer, torch.optim.Muon):
        step(problem.model, optimizer, problem.loss_fn, problem.pair)
    size = sum(p.numel() for p in parameters)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = displacement(optimizer, parameters, gradient)
    monkeypatch.setattr("hessianflow.curvature.displacement.BY_TENSOR", set())
    assert torch.equal(displacement(optimizer, parameters, gradient), alone)


def test_the_classes_stepped_one_tensor_at_a_time_are_named_right() -> None:
    for kind in (SGD, Adam, AdamW, RMSprop, LARS):
        assert f"{kind.__module__}.{kind.__qualname__}" in BY_TENSOR


@pytest.mark.parametrize("root", [1e-4, 0.3, 0.99, 1.0, 7.0, 5e4])
def test_the_crossing_of_a_straight_line_and_of_a_bent_one(root: float) -> None:
    calls = 0

    def bent(x: float) -> float:
        nonlocal calls
        calls += 1
        return (x / root) ** 1.5 - 1

    assert crossing(lambda x: x / root - 1, -1.0, 7) == pytest.approx(root, rel=0.011)
    if 0.01 < root < 100:
        assert crossing(bent, -1.0, 7) == pytest.approx(root, rel=0.03)
        assert calls <= 7
    assert crossing(lambda _: -1.0, -1.0, 7) == math.inf
