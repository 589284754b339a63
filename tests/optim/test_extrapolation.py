"""Extrapolation against a problem worked by hand."""

import pytest
import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import LARS, Extrapolation

F64 = torch.float64


def scalar(value: float = 1.0) -> Tensor:
    return torch.tensor([value], dtype=F64, requires_grad=True)


def test_two_workers_worked_by_hand() -> None:
    """f_k = (w - c_k)^2 / 2 with c = (0, 4), w = 1, look-ahead 0.1, rate 0.5.

    Local gradients 1 and -3, look-ahead points 0.9 and 1.3, mean gradient -0.9, w = 1.45.
    """
    workers = [scalar(), scalar()]
    optimizers = [Extrapolation(torch.optim.SGD([w], 0.5), 0.1) for w in workers]
    for weight, optimizer, c in zip(workers, optimizers, (0.0, 4.0), strict=True):
        weight.grad = weight.detach() - c
        optimizer.lookahead()
    assert [w.item() for w in workers] == pytest.approx([0.9, 1.3])
    mean = sum(w.detach() - c for w, c in zip(workers, (0.0, 4.0), strict=True)) / 2
    for weight, optimizer in zip(workers, optimizers, strict=True):
        weight.grad = torch.as_tensor(mean).clone()
        optimizer.step()
    assert [w.item() for w in workers] == pytest.approx([1.45, 1.45])


def closure_for(weight: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = (weight**4).sum()
    loss.backward()
    return loss.detach()


def test_closure_is_called_before_and_after_the_lookahead() -> None:
    """w = 1: gradient 4, look-ahead 0.96, gradient 4 * 0.96^3, step of 0.1."""
    weight = scalar()
    optimizer = Extrapolation(torch.optim.SGD([weight], 0.1), 0.01)
    loss = optimizer.step(lambda: closure_for(weight, optimizer))
    assert loss == 1
    assert weight.item() == pytest.approx(1 - 0.4 * 0.96**3)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: LARS(p, 0.1)]
)
def test_no_lookahead_is_the_base_optimizer(make: object) -> None:
    """Rate 0 in the look-ahead, or no look-ahead at all: bit for bit the base optimizer, momentum
    included."""
    results = []
    for wrap in (lambda base: base, lambda base: Extrapolation(base, 0.0)):
        weight = scalar(0.7)
        optimizer = wrap(make([weight]))  # type: ignore[operator]
        for _ in range(5):
            optimizer.step(lambda w=weight, o=optimizer: closure_for(w, o))
        results.append(weight.item())
    assert results[0] == results[1]


def test_state_and_schedulers_are_shared_with_the_base() -> None:
    weight = scalar()
    base = torch.optim.SGD([weight], 0.1, momentum=0.9)
    optimizer = Extrapolation(base, 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(lambda: closure_for(weight, optimizer))
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.05
    assert optimizer.state is base.state
    other = Extrapolation(torch.optim.SGD([scalar()], 9.0, momentum=0.9), 0.01)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    assert next(iter(other.state.values())).keys() == {"momentum_buffer"}


def test_parameters_without_gradient_stay() -> None:
    weight, idle = scalar(), scalar(5.0)
    optimizer = Extrapolation(torch.optim.SGD([weight, idle], 0.1), 0.01)
    optimizer.step(lambda: closure_for(weight, optimizer))
    assert idle.item() == 5


def test_weights_are_put_back_when_the_closure_fails() -> None:
    """At the point ahead memory runs out, say: the step can be taken again."""
    weight = scalar()
    optimizer = Extrapolation(torch.optim.SGD([weight], 0.1), 0.01)

    def failing() -> Tensor:
        if weight.item() != 1:
            raise MemoryError
        return closure_for(weight, optimizer)

    with pytest.raises(MemoryError):
        optimizer.step(failing)
    assert weight.item() == 1
    optimizer.step(lambda: closure_for(weight, optimizer))
    assert weight.item() == pytest.approx(1 - 0.4 * 0.96**3)


def test_misuse_is_refused() -> None:
    weight = scalar()
    optimizer = Extrapolation(torch.optim.SGD([weight], 0.1), 0.01)
    weight.grad = torch.ones(1, dtype=F64)
    optimizer.lookahead()
    with pytest.raises(
        HessianFlowError, match="lookahead must be followed by step, got a second look-ahead"
    ):
        optimizer.lookahead()
    with pytest.raises(HessianFlowError, match="closure must return the loss, got None"):
        optimizer.step(lambda: None)
    with pytest.raises(HessianFlowError, match="lookahead_lr must be a finite number >= 0, got -1"):
        Extrapolation(torch.optim.SGD([weight], 0.1), -1)
