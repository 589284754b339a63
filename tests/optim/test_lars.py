"""LARS against numbers worked by hand, a per-tensor loop written from the formulas, and
torch.optim.SGD."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import CLARS, LAMB, LARS
from hessianflow.optim.foreach import add_scaled_, scaled, written_out

TOLERANCE = 1e-7  # the worked numbers are given to eight decimals
PUBLISHED = {
    # form: (options), weights after each of two steps with w = (3, 4), g = (1, 0) and the settings
    # of vector_model
    "paper": ({}, (2.95095238, 3.99809524), (2.85807301, 3.99448827)),
    "tensorflow": ({}, (2.95003766, 3.99805971), (2.85542276, 3.99438535)),
    "late": ({"eps": 1e-6}, (2.95003771, 3.99805972), (2.85568341, 3.99439547)),
}


def vector_model(*, lr: float = 10, **options: object) -> tuple[Tensor, LARS]:
    """w = (3, 4) with the gradient (1, 0) of a linear loss."""
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    settings = {"momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.001, **options}
    optimizer = LARS([weight], lr, **settings)  # type: ignore[arg-type]
    weight.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return weight, optimizer


def values(weight: Tensor) -> list[float]:
    return weight.detach().flatten().tolist()


@pytest.mark.parametrize("form", PUBLISHED)
def test_worked_steps(form: str) -> None:
    options, first, second = PUBLISHED[form]
    weight, optimizer = vector_model(form=form, **options)
    optimizer.step()
    assert values(weight) == pytest.approx(first, abs=TOLERANCE)
    optimizer.step()
    assert values(weight) == pytest.approx(second, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("form", "second"), [("paper", (2.88244127, 3.99543461)), ("outside", (2.90451270, 3.99629176))]
)
def test_a_change_of_rate_tells_the_forms_apart(form: str, second: tuple[float, float]) -> None:
    """Rate 10, then 5: the paper's buffer keeps the old rate, the other order does not."""
    weight, optimizer = vector_model(form=form)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 5
    optimizer.step()
    assert values(weight) == pytest.approx(second, abs=TOLERANCE)


def test_rate_outside_is_the_papers_form_with_momentum_correction() -> None:
    """Goyal et al., section 3: at a change of rate the paper's buffer is multiplied by the ratio of
    the rates."""
    outside, plain = vector_model(form="outside"), vector_model(form="paper")
    for rate in (10.0, 40.0, 40.0, 5.0):
        factor = rate / plain[1].param_groups[0]["lr"]
        for weight, optimizer in (outside, plain):
            if weight is plain[0] and optimizer.state:
                optimizer.state[weight]["momentum_buffer"].mul_(factor)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        assert values(plain[0]) == pytest.approx(values(outside[0]), abs=1e-12)


@pytest.mark.parametrize(("lr", "first"), [(10, (2.90190476, 3.99619048)), (0.05, (2.9485, 3.998))])
def test_clipped_ratio(lr: float, first: tuple[float, float]) -> None:
    """LARC: factor 0.00952381 at rate 10; at rate 0.05 it is clipped to 1."""
    weight, optimizer = vector_model(lr=lr, form="larc", trust_coefficient=0.02)
    optimizer.step()
    assert values(weight) == pytest.approx(first, abs=TOLERANCE)


def network(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
            )
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    rate: bool = False,
) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + step)
        inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        if rate:
            optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("nesterov", "momentum"), [(False, 0.0), (False, 0.9), (True, 0.9)])
def test_ratio_one_is_sgd_bit_for_bit(nesterov: bool, momentum: float) -> None:
    """Clipping at 1 with a huge coefficient makes every ratio exactly 1; vectors are not adapted
    anyway."""
    ours, theirs = network(), network()
    options = {"lr": 0.3, "momentum": momentum, "weight_decay": 0.05, "nesterov": nesterov}
    lars = LARS(
        ours.parameters(), form="larc", trust_coefficient=1e12, decay_vectors=True, **options
    )  # type: ignore[arg-type]
    train(ours, lars, 50, rate=True)
    train(theirs, torch.optim.SGD(theirs.parameters(), **options), 50, rate=True)  # type: ignore[arg-type]
    assert same(ours, theirs)


def test_vectors_are_sgd_without_decay_by_default() -> None:
    ours, theirs = network(), network()
    vectors = [[p for p in model.parameters() if p.ndim == 1] for model in (ours, theirs)]
    train(ours, LARS(vectors[0], 0.3, weight_decay=0.05), 50, rate=True)
    train(theirs, torch.optim.SGD(vectors[1], 0.3, momentum=0.9), 50, rate=True)
    assert same(ours, theirs)


def reference_steps(
    weights: list[Tensor], gradients: list[list[Tensor]], group: dict[str, object]
) -> list[Tensor]:
    """The paper's box tensor by tensor in plain Python; vectors by the rule of torch SGD."""
    lr, m, b, eta = (
        group[name] for name in ("lr", "momentum", "weight_decay", "trust_coefficient")
    )
    weights, buffers = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    for grads in gradients:
        for i, g in enumerate(grads):
            w = weights[i]
            if w.ndim <= 1:
                buffers[i] = m * buffers[i] + g  # type: ignore[operator]
                weights[i] = w - lr * buffers[i]  # type: ignore[operator]
                continue
            w_norm, g_norm = math.sqrt(float((w * w).sum())), math.sqrt(float((g * g).sum()))
            ratio = eta * w_norm / (g_norm + b * w_norm) if w_norm and g_norm else 1.0  # type: ignore[operator]
            buffers[i] = m * buffers[i] + lr * ratio * (g + b * w)  # type: ignore[operator]
            weights[i] = w - buffers[i]
    return weights


def test_lists_equal_the_per_tensor_loop() -> None:
    """Tensors of every dimension, several dtypes aside; 1e-12 allows for another order of summation
    in the norms."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4,), (3, 5), (2, 3, 3, 3), (), (7, 1), (2, 0)]
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = [draw(s) for s in shapes]
    gradients = [[draw(s) for s in shapes] for _ in range(5)]
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = LARS(params, 0.7, weight_decay=0.02, trust_coefficient=0.1)
    for grads in gradients:
        for parameter, gradient in zip(params, grads, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for parameter, expected in zip(
        params, reference_steps(weights, gradients, optimizer.param_groups[0]), strict=True
    ):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient_scale_does_not_matter_and_weight_scale_does() -> None:
    """Without decay, a gradient 1000 times larger gives the same step; weights twice as large,
    twice the step."""
    moved = []
    for weight_factor, gradient_factor in ((1, 1), (1, 1000), (2, 1)):
        weight, optimizer = vector_model(weight_decay=0)
        with torch.no_grad():
            weight.mul_(weight_factor)
        before = weight.detach().clone()
        weight.grad *= gradient_factor  # type: ignore[operator]
        optimizer.step()
        moved.append(before - weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved[2], 2 * moved[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["paper", "tensorflow", "outside", "larc", "late"])
@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_zero_norms_mean_ratio_one(form: str, weight: float, gradient: float) -> None:
    parameter = torch.full((2, 2), weight, dtype=torch.float64, requires_grad=True)
    optimizer = LARS([parameter], 0.5, form=form)  # type: ignore[arg-type]
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    torch.testing.assert_close(
        parameter.detach(), torch.full((2, 2), weight - 0.5 * gradient, dtype=torch.float64)
    )


def test_switches_for_vectors() -> None:
    """w = 2, g = 1, lr = 1, decay 0.1, no momentum; the ratio is 0.5 * 2 / (1 + 0.2), without decay
    0.5 * 2 / 1."""
    results = []
    for options in (
        {},
        {"decay_vectors": True},
        {"decay_vectors": True, "adapt_vectors": True},
        {"adapt_vectors": True},
    ):
        weight = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        optimizer = LARS(
            [weight], 1.0, momentum=0, weight_decay=0.1, trust_coefficient=0.5, **options
        )  # type: ignore[arg-type]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        results.append(float(weight.detach()))
    assert results == pytest.approx([1.0, 0.8, 2 - 1.2 / 1.2, 2 - 1.0])


def test_groups_have_their_own_options() -> None:
    first, second = (torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = LARS(
        [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}],
        0.1,
        trust_coefficient=0.5,
    )
    first.grad, second.grad = (
        torch.ones(2, 2, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.float64),
    )
    optimizer.step()
    torch.testing.assert_close(2 * (1 - first.detach()), 1 - second.detach())


def test_parameters_without_gradient_stay() -> None:
    model = network()
    frozen = model[0].weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = LARS(model.parameters(), 0.1)
    train(model, optimizer, 2)
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    assert all(state.keys() == {"momentum_buffer"} for state in optimizer.state.values())


@pytest.mark.parametrize("form", ["paper", "late"])
def test_saved_loaded_continued_is_the_same(form: str) -> None:
    whole = network()
    train(whole, LARS(whole.parameters(), 0.5, trust_coefficient=0.05, form=form), 8)  # type: ignore[arg-type]
    half = network()
    optimizer = LARS(half.parameters(), 0.5, trust_coefficient=0.05, form=form)  # type: ignore[arg-type]
    train(half, optimizer, 4)
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed = network(seed=1)
    restored = LARS(resumed.parameters(), 9.0)
    resumed.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    train(resumed, restored, 4, start=4)
    assert same(resumed, whole)


def test_a_scheduler_drives_the_rate() -> None:
    _, optimizer = vector_model(weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5


def test_a_rate_on_the_device_gives_the_same_steps() -> None:
    ours, theirs = network(), network()
    lr = torch.tensor(0.5, dtype=torch.float64)
    options = {"trust_coefficient": 0.05, "weight_decay": 0.01, "nesterov": True}
    train(ours, LARS(ours.parameters(), lr, capturable=True, **options), 5)  # type: ignore[arg-type]
    train(theirs, LARS(theirs.parameters(), 0.5, **options), 5)  # type: ignore[arg-type]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_a_rate_on_the_device_is_kept_and_changed_in_place() -> None:
    """What a captured graph reads; a number stays a number, as in torch's optimizers."""
    lr = torch.tensor(0.5)
    _, optimizer = vector_model(lr=lr, capturable=True)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25
    assert isinstance(vector_model(lr=0.5, capturable=True)[1].param_groups[0]["lr"], float)


def test_half_precision_norms_do_not_overflow() -> None:
    """||g|| = 3e4 * 20 = 6e5 is beyond float16; the step 0.1 * ||w|| * g / ||g|| is not."""
    weight = torch.ones(20, 20, dtype=torch.float16, requires_grad=True)
    optimizer = LARS([weight], 1.0, trust_coefficient=0.1)
    weight.grad = torch.full_like(weight, 3e4)
    optimizer.step()
    torch.testing.assert_close(
        weight.detach().float(), torch.full((20, 20), 0.9), rtol=0, atol=2e-3
    )


def test_factors_written_out_keep_shapes_and_strides() -> None:
    """What a GPU uses: equal to broadcasting, also for channels-last and empty tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4, generator=generator).t(),
        torch.randn(2, 8, generator=generator)[:, ::2],
        torch.randn(0, 3),
        torch.randn(()),
    ]
    factors = torch.arange(1.0, 6.0)
    written = written_out(factors, tensors)
    for factor, tensor, full in zip(factors, tensors, written, strict=True):
        assert torch.equal(full, factor.expand(tensor.shape))
        if tensor.numel() > 1 and tensor is not tensors[2]:
            assert full.stride() == tensor.stride()
    for left, right in zip(
        scaled(tensors, factors), torch._foreach_mul(tensors, list(written)), strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("factor", [3.0, torch.tensor(3.0), torch.tensor([3.0, 3.0])])
def test_add_scaled(factor: float | Tensor) -> None:
    targets = [torch.ones(2), torch.ones(2, 2)]
    add_scaled_(targets, [torch.ones(2), 2 * torch.ones(2, 2)], factor, sign=-1.0)
    assert torch.equal(targets[0], torch.full((2,), -2.0))
    assert torch.equal(targets[1], torch.full((2, 2), -5.0))


def test_launches_do_not_grow_with_the_number_of_tensors() -> None:
    """Counted as dispatched operations: ten times the tensors, the same number of calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls = getattr(self, "calls", 0) + 1
            return function(*args, **(kwargs or {}))

    counts = []
    for number in (4, 40):
        params = [torch.ones(3, 3, requires_grad=True) for _ in range(number)]
        optimizer = LARS(params, 0.1, weight_decay=0.1)
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with Counter() as counter:
            optimizer.step()
        counts.append(counter.calls)
    assert counts[0] == counts[1] < 25


def test_closure_is_evaluated_with_gradients() -> None:
    weight, optimizer = vector_model()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    assert loss.item() == 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be a finite number >= 0, got -1"),
        ({"lr": "0.1"}, "lr must be a finite number >= 0, got '0.1'"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"lr": torch.tensor(1.0)}, r"lr as a tensor needs capturable=True, got tensor\(1\.\)"),
        (
            {"lr": torch.ones(1), "capturable": True},
            r"lr as a tensor must be 0-dim, got shape \[1\]: use lr.squeeze",
        ),
        (
            {"lr": torch.ones(2), "capturable": True},
            r"lr as a tensor must be 0-dim, got shape \[2\]",
        ),
        ({"lr": torch.tensor(-1.0), "capturable": True}, "lr must be a finite number >= 0, got -1"),
        ({"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        (
            {"trust_coefficient": math.inf},
            "trust_coefficient must be a finite number >= 0, got inf",
        ),
        ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
        (
            {"form": "timm"},
            "form must be one of paper, tensorflow, outside, larc, late, got 'timm'",
        ),
        ({"nesterov": True, "momentum": 0.0}, "momentum must be > 0 with nesterov, got 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        LARS([torch.ones(2, 2, requires_grad=True)], **{"lr": 0.1, **options})  # type: ignore[arg-type]


def test_a_refused_group_is_not_kept() -> None:
    _, optimizer = vector_model()
    with pytest.raises(HessianFlowError, match="lr must be"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "empty parameter list"),
        ([{"params": []}], "LARS must get at least one parameter in each group, got an empty list"),
        ([torch.ones(2, dtype=torch.complex64)], "real dense parameters, but number 0 is complex"),
        (
            [torch.ones(2), torch.eye(2).to_sparse()],
            "real dense parameters, but number 1 is torch.sparse_coo",
        ),
    ],
)
def test_bad_parameters(params: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(params, 0.1)  # type: ignore[arg-type]


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(
        HessianFlowError, match=r"LARS needs dense gradients, got torch\.sparse_coo"
    ):
        LARS(table.parameters(), 0.1).step()


@pytest.mark.parametrize("make", [lambda: None])
def test_a_closure_without_a_loss_is_refused(make: Callable[[], None]) -> None:
    _, optimizer = vector_model()
    with pytest.raises(HessianFlowError, match="closure must return the loss, got None"):
        optimizer.step(make)


def test_a_parameter_that_changed_its_shape_is_refused() -> None:
    weight, optimizer = vector_model()
    optimizer.step()
    weight.data = torch.ones(3, 3, dtype=torch.float64)
    weight.grad = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(
        HessianFlowError, match=r"must keep their shape, but \[1, 2\] became \[3, 3\]"
    ):
        optimizer.step()


@pytest.mark.parametrize("optimizer", [LARS, LAMB, CLARS])
@pytest.mark.parametrize("option", [{"adapt_vectors": "no"}, {"decay_vectors": 1}])
def test_flags_are_true_or_false(optimizer, option):
    (name, value), weights = *option.items(), [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(HessianFlowError, match=f"{name} must be True or False, got {value!r}"):
        optimizer(weights, lr=0.1, **option)
