"""LAMB against a number worked by hand, a per-tensor loop, and torch's AdamW where the ratio is
1."""

import copy
import math

import pytest
import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import LAMB

F64 = torch.float64


def draws(
    shapes: list[tuple[int, ...]], steps: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(steps)]


def run(
    optimizer: torch.optim.Optimizer, params: list[Tensor], gradients: list[list[Tensor]]
) -> list[Tensor]:
    for step in gradients:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in params]


def test_worked_first_step() -> None:
    """w = (3, 4), g = (1, 0), rate 0.01, decay 0.01: u = (1.029999, 0.04), trust 4.850717."""
    weight = torch.tensor([[3.0, 4.0]], dtype=F64, requires_grad=True)
    optimizer = LAMB([weight], 0.01, weight_decay=0.01)
    run(optimizer, [weight], [[torch.tensor([[1.0, 0.0]], dtype=F64)]])
    assert weight.flatten().tolist() == pytest.approx([2.95003766, 3.99805971], abs=1e-7)


def reference(
    weights: list[Tensor], gradients: list[list[Tensor]], clip: float | None
) -> list[Tensor]:
    """Algorithm 2 tensor by tensor, with rate 0.1, betas (0.8, 0.9), eps 1e-6 and decay 0.05;
    vectors as AdamW."""
    out, m, v = [w.clone() for w in weights], [0.0 * w for w in weights], [0.0 * w for w in weights]
    for t, grads in enumerate(gradients, 1):
        total = math.sqrt(sum(float((g * g).sum()) for g in grads))
        factor = min(1.0, clip / total) if clip else 1.0
        for i, raw in enumerate(grads):
            g = raw * factor
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g * g
            u = (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-6)
            if g.ndim > 1:
                u = u + 0.05 * out[i]
            out[i] = out[i] - 0.1 * (out[i].norm() / u.norm() if g.ndim > 1 else 1.0) * u
    return out


@pytest.mark.parametrize("clip", [None, 0.5, 50.0])
def test_lists_equal_the_per_tensor_loop(clip: float | None) -> None:
    weights, gradients = draws([(4,), (3, 5), (2, 3, 2, 2), ()], 5)
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = LAMB(params, 0.1, betas=(0.8, 0.9), weight_decay=0.05, max_grad_norm=clip)
    for ours, expected in zip(
        run(optimizer, params, gradients), reference(weights, gradients, clip), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_vectors_are_adamw() -> None:
    """Without adaptation the step is AdamW's, up to the order of its operations."""
    weights, gradients = draws([(6,), (2,)], 10)
    ours, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    run(LAMB(ours, decay_vectors=True, **options), ours, gradients)  # type: ignore[arg-type]
    run(torch.optim.AdamW(theirs, **options), theirs, gradients)  # type: ignore[arg-type]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_step_length_is_rate_times_norm() -> None:
    """Adapted tensors, vectors included on request, move by exactly lr * ||w||."""
    weights, gradients = draws([(5,), (3, 4)], 1)
    params = [w.clone().requires_grad_() for w in weights]
    moved = run(LAMB(params, 0.01, adapt_vectors=True), params, gradients)
    for before, after in zip(weights, moved, strict=True):
        assert float((after - before).norm()) == pytest.approx(
            0.01 * float(before.norm()), rel=1e-9
        )


def test_zero_norms_mean_ratio_one() -> None:
    weight = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    run(LAMB([weight], 0.1), [weight], [[torch.ones(2, 2, dtype=F64)]])
    torch.testing.assert_close(
        weight.detach(), torch.full((2, 2), -0.1, dtype=F64), rtol=1e-5, atol=0
    )
    still = torch.ones(2, 2, dtype=F64, requires_grad=True)
    run(LAMB([still], 0.1), [still], [[torch.zeros(2, 2, dtype=F64)]])
    assert torch.equal(still.detach(), torch.ones(2, 2, dtype=F64))


def test_capturable_gives_the_same_steps() -> None:
    weights, gradients = draws([(6,), (2, 3)], 4)
    ours, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    run(
        LAMB(ours, torch.tensor(0.1, dtype=F64), capturable=True, weight_decay=0.1), ours, gradients
    )
    run(LAMB(theirs, 0.1, weight_decay=0.1), theirs, gradients)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_saved_loaded_continued_is_the_same() -> None:
    weights, gradients = draws([(6,), (2, 3)], 8)
    whole, half = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    expected = run(LAMB(whole, 0.1), whole, gradients)
    first = LAMB(half, 0.1)
    run(first, half, gradients[:4])
    resumed = [p.detach().clone().requires_grad_() for p in half]
    second = LAMB(resumed, 9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(run(second, resumed, gradients[4:]), expected, strict=True):
        assert torch.equal(p, q)
    assert second.state[resumed[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert second.state[resumed[0]]["step"] == 8


def test_a_late_parameter_has_its_own_bias_correction() -> None:
    first, late = (torch.ones(2, 2, dtype=F64, requires_grad=True) for _ in range(2))
    optimizer = LAMB([first, late], 0.1)
    first.grad = torch.ones(2, 2, dtype=F64)
    optimizer.step()
    late.grad = torch.ones(2, 2, dtype=F64)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((2, 2), 0.9, dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be a finite number >= 0, got -1"),
        (
            {"lr": torch.ones(1), "capturable": True},
            r"lr as a tensor must be 0-dim, got shape \[1\]",
        ),
        ({"betas": (0.9, 1.0)}, "betas must be a finite number >= 0 and < 1, got 1.0"),
        ({"betas": (0.9,)}, r"betas must be two numbers such as \(0.9, 0.999\), got \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, r"betas must be two numbers .* got \(0.9, 0.9, 0.9\)"),
        ({"betas": 0.9}, r"betas must be two numbers .* got 0.9"),
        ({"eps": math.nan}, "eps must be a finite number >= 0, got nan"),
        ({"weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a finite number > 0, got 0: use None"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a finite number > 0, got -1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        LAMB([torch.ones(2, 2, requires_grad=True)], **{"lr": 0.1, **options})  # type: ignore[arg-type]


def test_a_closure_without_a_loss_is_refused() -> None:
    with pytest.raises(HessianFlowError, match="closure must return the loss, got None"):
        LAMB([torch.ones(2, 2, requires_grad=True)], 0.1).step(lambda: None)
