"""CLARS against numbers worked by hand, and against LARS where the two must agree."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hessianflow.interfaces import GradientObserver, HessianFlowError
from hessianflow.optim import CLARS, LARS, MicrobatchNorms

F64 = torch.float64


def stepped(
    per_sample: list[tuple[float, float]], lr: float = 1.0, **options: object
) -> tuple[Tensor, CLARS]:
    """w = (3, 4) after one step; every element of `per_sample` is the gradient of one microbatch of
    one example."""
    weight = torch.tensor([[3.0, 4.0]], dtype=F64, requires_grad=True)
    optimizer = CLARS([weight], lr, **options)  # type: ignore[arg-type]
    gradients = [torch.tensor([g], dtype=F64) for g in per_sample]
    observer = optimizer.norms
    assert isinstance(observer, MicrobatchNorms)
    for gradient in gradients:
        observer.on_microbatch([gradient], 1)
    weight.grad = torch.stack(gradients).mean(0)
    observer.on_step([weight.grad], len(gradients))
    optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trust_coefficient": 0.01}, (2.975, 3.975)),
        ({"trust_coefficient": 0.05}, (2.95, 3.95)),
        ({"trust_coefficient": 0.01, "weight_decay": 0.01}, (2.9735, 3.9730)),
        ({"trust_coefficient": 0.05, "max_rate": None}, (2.875, 3.875)),
    ],
)
def test_worked_steps(options: dict[str, object], expected: tuple[float, float]) -> None:
    """Gradients (1, 0) and (0, 1): A = 1, so the rate is 5 eta; 0.25 is capped at 0.1 in the second
    case."""
    weight, _ = stepped([(1, 0), (0, 1)], **options)
    assert weight.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_disagreement_lowers_the_rate_of_lars() -> None:
    """The same mean gradient (1/2, 1/2): LARS moves at 7.0711 eta, CLARS at 5 eta."""
    clars, _ = stepped([(1, 0), (0, 1)], trust_coefficient=0.001)
    agreed, _ = stepped([(0.5, 0.5), (0.5, 0.5)], trust_coefficient=0.001)
    start = torch.tensor([[3.0, 4.0]], dtype=F64)
    ratio = (start - agreed) / (start - clars)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2**0.5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", ["paper", "outside", "larc", "late"])
def test_identical_samples_are_lars(form: str) -> None:
    """M = 1: the same steps as LARS of the same form without decay, over several steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=F64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = {"trust_coefficient": 0.02, "form": form}
    clars = CLARS([ours], 0.02, max_rate=None, **options)  # type: ignore[arg-type]
    lars = LARS([theirs], 0.02, **options)  # type: ignore[arg-type]
    for _ in range(6):
        gradient = torch.randn(3, 4, generator=generator, dtype=F64)
        assert isinstance(clars.norms, MicrobatchNorms)
        for _ in range(3):
            clars.norms.on_microbatch([gradient], 4)
        clars.norms.on_step([gradient], 12)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        clars.step()
        lars.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("lr", "eta", "moved"),
    [(0.5, 0.01, 0.05), (0.01, 0.01, 0.01), (0.5, 0.05, 0.1)],
    ids=["ratio", "clipped", "capped"],
)
def test_clipped_ratio(lr: float, eta: float, moved: float) -> None:
    """LARC with A = 1: the layer's rate lr * min(ratio / lr, 1) is 5 eta, but at most the rate and
    at most the cap."""
    weight, _ = stepped([(1, 0)], lr, trust_coefficient=eta, form="larc")
    assert weight.flatten().tolist() == pytest.approx([3 - moved, 4], abs=1e-12)


@pytest.mark.parametrize("form", ["outside", "larc", "late"])
def test_zero_norms_mean_ratio_one(form: str) -> None:
    weight = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    optimizer = CLARS([weight], 5.0, max_rate=None, form=form)  # type: ignore[arg-type]
    weight.grad = torch.ones_like(weight)
    optimizer.norms.on_microbatch([weight.grad], 1)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -5.0, dtype=F64))


def test_the_cap_is_counted() -> None:
    _, free = stepped([(1, 0)], trust_coefficient=0.01)
    assert free.capped_share() == 0
    weight, bound = stepped([(1, 0)], trust_coefficient=0.05)
    assert bound.capped_share() == 1
    assert bound.capped_share() == 0
    assert weight.tolist() == [[2.9, 4.0]]
    assert CLARS([torch.ones(2, 2, requires_grad=True)], 0.1).capped_share() == 0


def test_vectors_are_sgd_and_groups_find_their_norms() -> None:
    """Parameter groups in another order than the model's; the norms are found by parameter."""
    model = nn.Linear(3, 2).double()
    norms = MicrobatchNorms(model.parameters())
    optimizer = CLARS(
        [{"params": [model.bias]}, {"params": [model.weight]}],
        1.0,
        trust_coefficient=0.01,
        max_rate=None,
        norms=norms,
    )
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    gradients = [torch.full((2, 3), 2.0, dtype=F64), torch.ones(2, dtype=F64)]
    norms.on_microbatch(gradients, 5)
    model.weight.grad, model.bias.grad = gradients
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), bias - 1)
    torch.testing.assert_close(model.weight.detach(), weight - 0.01 * weight.norm() / 24**0.5 * 2)


def test_the_order_of_several_groups_must_be_told() -> None:
    """Two layers of one shape, the second in the first group: nothing but the caller knows which
    gradient is whose."""
    first, second = (torch.ones(2, 2, dtype=F64, requires_grad=True) for _ in range(2))
    optimizer = CLARS(
        [{"params": [second]}, {"params": [first]}], 1.0, trust_coefficient=0.01, max_rate=None
    )
    assert isinstance(optimizer.norms, MicrobatchNorms)
    first.grad, second.grad = torch.full((2, 2), 4.0, dtype=F64), torch.ones(2, 2, dtype=F64)
    for show in (optimizer.norms.on_microbatch, optimizer.norms.on_step):
        with pytest.raises(
            HessianFlowError,
            match=r"must know whose gradients it is shown: call bind\(parameters\)",
        ):
            show([first.grad, second.grad], 1)
    optimizer.norms.bind([first, second])
    optimizer.norms.on_microbatch([first.grad, second.grad], 1)
    optimizer.step()
    for weight in (first, second):  # ||w|| = 2; the direction has that length, too
        torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.99, dtype=F64))


def test_saved_loaded_continued_is_the_same() -> None:
    def run(optimizer: CLARS, weight: Tensor, steps: range) -> None:
        for step in steps:
            gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step), dtype=F64)
            optimizer.norms.on_microbatch([gradient], 1)  # type: ignore[attr-defined]
            weight.grad = gradient
            optimizer.norms.on_step([gradient], 1)  # type: ignore[attr-defined]
            optimizer.step()

    whole, half = (torch.ones(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    run(CLARS([whole], 1.0), whole, range(6))
    first = CLARS([half], 1.0)
    run(first, half, range(3))
    resumed = half.detach().clone().requires_grad_()
    second = CLARS([resumed], 5.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, resumed, range(3, 6))
    assert torch.equal(resumed, whole)


def test_norms_is_a_gradient_observer() -> None:
    observer: GradientObserver = MicrobatchNorms([torch.ones(2, requires_grad=True)])
    assert observer.signals() == {}
    observer.load_state_dict(observer.state_dict())


def test_a_step_without_norms_says_what_to_attach() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = CLARS([weight], 0.1)
    weight.grad = torch.ones(2, 2)
    with pytest.raises(
        HessianFlowError,
        match="MicrobatchNorms has seen no gradient: attach it to the training loop",
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rate": 0}, "max_rate must be a finite number > 0, got 0: use None"),
        ({"max_rate": -1}, "max_rate must be a finite number > 0, got -1"),
        ({"lr": -1}, "lr must be a finite number >= 0, got -1"),
        ({"form": "box"}, "form must be one of paper"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        CLARS([torch.ones(2, 2, requires_grad=True)], **{"lr": 0.1, **options})  # type: ignore[arg-type]
