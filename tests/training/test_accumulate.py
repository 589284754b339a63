"""Oracle: the gradient of the mean loss of the whole batch in one pass, float64, by
torch.autograd."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessianflow.batches import split
from hessianflow.interfaces import HessianFlowError
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.world import LocalWorld


def problem(examples: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, (torch.randn(examples, 5, dtype=torch.float64), torch.randint(3, (examples,)))


def accumulator(model: nn.Module, loss_fn, **options) -> GradientAccumulator:
    return GradientAccumulator(
        model, loss_fn, [p for p in model.parameters() if p.requires_grad], **options
    )


def one_pass(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    )


@pytest.mark.parametrize("examples", [1, 7, 16, 130])
@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 16, 1000])
def test_accumulated_gradient_is_the_one_pass_gradient(examples: int, microbatch_size: int | None):
    model, batch = problem(examples)
    result = accumulator(model, F.cross_entropy)(batch, microbatch_size)
    for parameter, expected in zip(model.parameters(), one_pass(model, batch), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)
    assert result.loss.item() == pytest.approx(
        F.cross_entropy(model(batch[0]), batch[1]).item(), rel=1e-6
    )
    assert result.hits is not None
    assert result.hits.counted == examples
    assert result.hits.correct.item() == (model(batch[0]).argmax(1) == batch[1]).sum().item()


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        functools.partial(F.cross_entropy, reduction="sum"),
        functools.partial(F.cross_entropy, reduction="none"),
    ],
    ids=["sum", "none", "partial sum", "partial none"],
)
def test_every_reduction_gives_the_mean(loss_fn):
    model, batch = problem(10)
    accumulator(model, loss_fn)(batch, 4)
    for parameter, expected in zip(model.parameters(), one_pass(model, batch), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


def test_old_gradients_never_enter():
    model, batch = problem(10)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    accumulator(model, F.cross_entropy)(batch, 4)
    torch.testing.assert_close(
        next(model.parameters()).grad, one_pass(model, batch)[0], rtol=1e-12, atol=1e-14
    )


class Recorder:
    """A gradient observer that keeps what it was shown."""

    def __init__(self) -> None:
        self.parts: list[tuple[list[torch.Tensor], int]] = []
        self.whole: list[tuple[list[torch.Tensor], int]] = []

    def on_microbatch(self, gradients, examples):
        self.parts.append(([g.clone() for g in gradients], examples))

    def on_step(self, gradients, examples):
        self.whole.append(([g.clone() for g in gradients], examples))

    def signals(self):
        return {}


def test_observers_see_every_microbatch_and_the_whole():
    model, batch = problem(10)
    plain, _ = problem(10)
    accumulator(plain, F.cross_entropy)(batch, 4)
    recorder = Recorder()
    accumulate = accumulator(model, F.cross_entropy, observers=[recorder])
    accumulate.world.begin(10)
    accumulate.reduce_over_ranks(accumulate(batch, 4))
    assert [count for _, count in recorder.parts] == [4, 3, 3]
    for (gradients, _), micro in zip(recorder.parts, split(batch, 4), strict=True):
        for got, expected in zip(gradients, one_pass(model, micro), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    [(whole, total)] = recorder.whole
    assert total == 10
    for got, expected, own in zip(whole, plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_observers_see_zeros_for_an_unused_parameter():
    model, batch = problem(6)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    recorder = Recorder()
    accumulator(model, F.cross_entropy, observers=[recorder])(batch, 3)
    names = [name for name, _ in model.named_parameters()]
    assert torch.equal(
        recorder.parts[0][0][names.index("unused")], torch.zeros(2, dtype=torch.float64)
    )
    assert model.unused.grad is None


def test_frozen_parameters_get_no_gradient():
    model, batch = problem(6)
    model[0].weight.requires_grad_(False)
    accumulator(model, F.cross_entropy, observers=[Recorder()])(batch, 3)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_no_examples_give_no_gradient():
    """On one of several ranks; a world of one refuses them."""
    model, batch = problem(4)
    accumulate = accumulator(model, F.cross_entropy)
    accumulate(batch)
    result = accumulate((torch.zeros(0, 5).double(), torch.zeros(0, dtype=torch.long)))
    assert (result.loss.item(), result.hits, result.rows) == (0.0, None, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(HessianFlowError, match="0 examples"):
        LocalWorld().begin(0)


def test_bf16_stays_close_to_float32():
    """bfloat16 keeps 8 bits: relative errors of a few times 2^-8 in the gradient norm are what to
    expect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    batch = (torch.randn(64, 20), torch.randint(4, (64,)))
    exact = torch.cat([g.flatten() for g in one_pass(model, batch)])
    accumulator(model, F.cross_entropy, precision="bf16")(batch, 16)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0 < (got - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [
        (130, 128, [65, 65]),
        (10, 4, [4, 3, 3]),
        (5, 5, [5]),
        (3, 9, [3]),
        (3, 2, [3]),
        (7, 2, [3, 2, 2]),
        (3, 1, [1, 1, 1]),
        (1, 2, [1]),
    ],
)
def test_split_makes_the_fewest_and_most_equal_pieces(total: int, size: int, expected: list[int]):
    pieces = list(split((torch.arange(total), {"y": torch.arange(total)}), size))
    assert [len(x) for x, _ in pieces] == expected
    assert torch.equal(torch.cat([x for x, _ in pieces]), torch.arange(total))
    assert torch.equal(torch.cat([y["y"] for _, y in pieces]), torch.arange(total))


LABELS = torch.tensor([0, 2, 2, -100, 1, 2, 0, 1, 2, 2])
SKEWED = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=SKEWED),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(),
        functools.partial(F.cross_entropy, weight=SKEWED),
        functools.partial(nn.CrossEntropyLoss(weight=SKEWED)),
        F.cross_entropy,
    ],
    ids=["class weights", "ignored class", "padding", "partial", "partial of a module", "function"],
)
@pytest.mark.parametrize("microbatch_size", [3, 4, 10])
def test_losses_that_do_not_divide_by_the_number_of_examples(loss_fn, microbatch_size: int):
    """Class weights and ignored targets: the oracle is the loss of the whole batch in one pass."""
    model, (inputs, _) = problem(10)
    labels = LABELS.clone()
    if getattr(loss_fn, "ignore_index", -100) == 1:
        labels[3] = 0
    expected = torch.autograd.grad(loss_fn(model(inputs), labels), list(model.parameters()))
    result = accumulator(model, loss_fn)((inputs, labels), microbatch_size)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    assert result.loss.item() == pytest.approx(loss_fn(model(inputs), labels).item(), rel=1e-6)


def test_fp16_scales_the_loss_and_shows_observers_unscaled_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
    batch = (torch.randn(64, 20), torch.randint(4, (64,)))
    exact = torch.cat([g.flatten() for g in one_pass(model, batch)])
    recorder = Recorder()
    accumulate = accumulator(model, F.cross_entropy, observers=[recorder], precision="fp16")
    accumulate.world.begin(64)
    accumulate.reduce_over_ranks(accumulate(batch, 16))
    scale = accumulate.scaler.get_scale()
    assert scale > 1
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (got / scale - exact).norm() / exact.norm() < 0.01
    shown = torch.cat([g.flatten() for g in recorder.whole[0][0]])
    assert 0 < (shown - exact).norm() / exact.norm() < 0.01
    part = torch.cat([g.flatten() for g in recorder.parts[0][0]])
    first = torch.cat([g.flatten() for g in one_pass(model, (batch[0][:16], batch[1][:16]))])
    assert (part - first).norm() / first.norm() < 0.01
