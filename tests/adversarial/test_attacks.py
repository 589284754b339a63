"""Attacks against worked numbers and closed forms on linear models, where the worst perturbation is
known."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from hessianflow.adversarial import fgsm, pgd


class Scale(nn.Module):
    """f(x) = theta * x."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(float(theta), dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


def half_squared_error(outputs, targets):
    return 0.5 * ((outputs - targets) ** 2).mean()


def linear(weight):
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    return layer


def small_net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.rand(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    return net, x, torch.tensor([0, 1, 2, 0, 1, 2])


def test_worked_case_of_absa():
    """Logits Wx, W=[[1,-2],[0,0]], x=(.5,.5), label 0, eps=.005: the gradient's signs are
    (-1,+1)."""
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    result = fgsm(linear([[1, -2], [0, 0]]), x, torch.tensor([0]), 0.005, value_range=(0, 1))
    torch.testing.assert_close(
        result, torch.tensor([[0.495, 0.505]], dtype=torch.float64), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(
    ("theta_of_attack", "perturbed", "loss"), [(1.0, 0.9, 0.605), (-1.0, 1.1, 0.405)]
)
def test_worked_cases_of_conadv(theta_of_attack, perturbed, loss):
    """f = theta x, loss (f - y)^2 / 2, x=1, y=2, eps=.1; loss at theta=1, attacked at 1 or at a
    stale -1."""
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    result = fgsm(Scale(theta_of_attack), x, y, 0.1, value_range=None, loss_fn=half_squared_error)
    assert result.item() == pytest.approx(perturbed, abs=1e-15)
    assert half_squared_error(Scale(1.0)(result), y).item() == pytest.approx(loss, abs=1e-12)


def test_eps_zero_returns_the_inputs():
    net, x, y = small_net()
    assert torch.equal(fgsm(net, x, y, 0.0, value_range=(0, 1)), x)
    assert torch.equal(pgd(net, x, y, 0.0, value_range=(0, 1), norm="l_2"), x)
    assert torch.equal(pgd(net, x, y, 0.0, value_range=(0, 1)), x)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_pgd_finds_the_worst_point_of_a_linear_model(norm):
    """Binary linear classifier: the worst delta is eps sign(w) in l_inf and eps w/||w|| in l_2, in
    closed form."""
    weight = torch.tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    x = torch.zeros(2, 3, dtype=torch.float64)
    y = torch.tensor([0, 1])
    model = linear(torch.stack([weight, -weight]))
    direction = weight.sign() if norm == "l_inf" else weight / weight.norm()
    expected = 0.1 * torch.stack([-direction, direction])
    generator = torch.Generator().manual_seed(1)
    result = pgd(
        model,
        x,
        y,
        0.1,
        value_range=None,
        norm=norm,
        steps=60,
        relative_step=0.5,
        generator=generator,
    )
    # On the l_2 sphere a step of 0.5 divides the component across the gradient by at least about
    # 1.1 far from the optimum and 1.5 near it: 60 steps leave less than 1e-8 of it.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_l2_without_random_start_is_exact_on_a_linear_model():
    weight = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x = torch.zeros(1, 2, dtype=torch.float64)
    model = linear(torch.stack([weight, -weight]))
    result = pgd(model, x, torch.tensor([0]), 0.5, value_range=None, norm="l_2", random_start=False)
    torch.testing.assert_close(
        result, torch.tensor([[-0.3, 0.4]], dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_eps_per_channel_is_the_attack_before_normalisation():
    """Attacking (x - mean)/std with eps/std equals attacking x with eps in front of the
    normalisation."""
    net, x, y = small_net()
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    std = torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64)

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net((images - mean[:, None, None]) / std[:, None, None])

    z = (x - mean[:, None, None]) / std[:, None, None]
    value_range = (-mean / std, (1 - mean) / std)
    for norm in ("l_inf", "l_2"):
        raw = pgd(Normalised(), x, y, 0.03, value_range=(0, 1), norm=norm, random_start=False)
        scaled = pgd(net, z, y, 0.03 / std, value_range=value_range, norm=norm, random_start=False)
        unscaled = scaled * std[:, None, None] + mean[:, None, None]
        torch.testing.assert_close(unscaled, raw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_pgd_stays_in_the_ball_and_in_the_range(norm):
    net, x, y = small_net()
    result = pgd(
        net,
        x,
        y,
        0.3,
        value_range=(0, 1),
        norm=norm,
        steps=7,
        generator=torch.Generator().manual_seed(0),
    )
    delta = (result - x).flatten(1)
    size = delta.abs().amax(1) if norm == "l_inf" else delta.norm(dim=1)
    assert size.max() <= 0.3 + 1e-12
    assert result.min() >= 0
    assert result.max() <= 1
    assert cross_entropy(net.eval()(result), y) > cross_entropy(net(x), y)


def test_clamp_uses_the_stated_range_and_not_that_of_the_batch():
    """A constant image is perturbed by eps; an image at the border moves inwards only."""
    x = torch.full((1, 2), 1.0, dtype=torch.float64)
    result = fgsm(linear([[1, -2], [0, 0]]), x, torch.tensor([0]), 0.1, value_range=(0, 1))
    torch.testing.assert_close(
        result, torch.tensor([[0.9, 1.0]], dtype=torch.float64), rtol=0, atol=1e-15
    )
    unclamped = fgsm(linear([[1, -2], [0, 0]]), x, torch.tensor([0]), 0.1, value_range=None)
    torch.testing.assert_close(
        unclamped, torch.tensor([[0.9, 1.1]], dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_targeted_lowers_the_loss_towards_the_target():
    net, x, _ = small_net()
    target = torch.tensor([2, 2, 2, 1, 1, 1])
    before = cross_entropy(net.eval()(x), target)
    assert (
        cross_entropy(net(fgsm(net, x, target, 0.05, value_range=(0, 1), targeted=True)), target)
        < before
    )
    assert (
        cross_entropy(net(pgd(net, x, target, 0.05, value_range=(0, 1), targeted=True)), target)
        < before
    )


def test_soft_labels_attack_the_mixed_loss():
    """One-hot probabilities are the hard label; an even mixture of two opposite labels has its own
    gradient."""
    net, x, y = small_net()
    one_hot = nn.functional.one_hot(y, 3).double()
    hard = fgsm(net, x, y, 0.05, value_range=(0, 1))
    assert torch.equal(fgsm(net, x, one_hot, 0.05, value_range=(0, 1)), hard)
    even = fgsm(net, x, torch.full_like(one_hot, 1 / 3), 0.05, value_range=(0, 1))
    assert not torch.equal(even, hard)


def test_examples_do_not_weigh_each_other_down():
    """In eval mode each example is attacked as if alone, in both norms."""
    net, x, y = small_net()
    for norm in ("l_inf", "l_2"):
        together = pgd(net, x, y, 0.1, value_range=(0, 1), norm=norm, random_start=False)
        alone = [
            pgd(
                net,
                x[i : i + 1],
                y[i : i + 1],
                0.1,
                value_range=(0, 1),
                norm=norm,
                random_start=False,
            )
            for i in range(6)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def test_random_start_of_fgsm_follows_wong():
    """On a linear loss the result is project(start + 1.25 eps sign(g)) with the start drawn from
    the generator."""
    x = torch.zeros(4, 2, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.long)
    start = 0.1 * (
        2 * torch.rand((4, 2), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    )
    expected = (start + 0.125 * torch.tensor([-1.0, 1.0], dtype=torch.float64)).clamp(-0.1, 0.1)
    result = fgsm(
        linear([[1, -2], [0, 0]]),
        x,
        y,
        0.1,
        value_range=None,
        random_start=True,
        generator=torch.Generator().manual_seed(3),
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)


def test_no_generator_means_fresh_entropy():
    net, x, y = small_net()
    first = fgsm(net, x, y, 0.1, value_range=(0, 1), random_start=True)
    assert not torch.equal(first, fgsm(net, x, y, 0.1, value_range=(0, 1), random_start=True))


def test_random_l2_starts_fill_the_ball():
    """The radius of a uniform point of the d-ball has mean d/(d+1); 4000 points give a standard
    error below 0.005."""
    from hessianflow.adversarial.budget import broadcast_to, make_budget

    x = torch.zeros(4000, 3, dtype=torch.float64)
    budget = broadcast_to(make_budget(2.0, None, "l_2"), x)
    delta = budget.random(x, torch.Generator().manual_seed(0))
    radius = delta.norm(dim=1) / 2
    assert radius.max() <= 1
    assert radius.mean().item() == pytest.approx(0.75, abs=0.02)
    assert delta.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attack_leaves_no_trace(attack, norm_mode):
    net, x, y = small_net()
    net.train()
    net[3].eval()
    net[0].bias.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    gradients = [p.grad for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    result = attack(net, x, y, 0.1, value_range=(0, 1), random_start=True, norm_mode=norm_mode)
    assert not result.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(a is b for a, b in zip([p.grad for p in net.parameters()], gradients, strict=True))
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_norm_mode_changes_the_statistics_used():
    net, x, y = small_net()
    net[1].running_mean.fill_(5.0)
    assert not torch.equal(
        fgsm(net, x, y, 0.1, value_range=(0, 1)),
        fgsm(net, x, y, 0.1, value_range=(0, 1), norm_mode="batch"),
    )


def test_only_the_input_gradient_is_computed():
    """During the attack no parameter takes part in the graph."""
    seen = []

    class Watch(nn.Linear):
        def forward(self, inputs):
            seen.append((self.weight.requires_grad, inputs.requires_grad))
            return super().forward(inputs)

    fgsm(Watch(2, 2), torch.rand(3, 2), torch.tensor([0, 1, 0]), 0.1, value_range=(0, 1))
    assert seen == [(False, True)]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context):
    net, x, y = small_net()
    expected = fgsm(net, x, y, 0.1, value_range=(0, 1))
    with context():
        inputs = x.clone()
        assert torch.equal(fgsm(net, inputs, y, 0.1, value_range=(0, 1)), expected)


def test_under_autocast():
    """Mixed precision changes signs of tiny gradients at most; the result keeps the inputs'
    precision and the ball."""
    net, x, y = small_net()
    net, x = net.float(), x.float()
    expected = fgsm(net, x, y, 0.1, value_range=(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fgsm(net, x, y, 0.1, value_range=(0, 1))
    assert result.dtype == torch.float32
    assert (result - x).abs().max() <= 0.1 + 1e-6
    assert ((result - expected).abs() < 1e-6).float().mean() > 0.9


def test_sum_and_per_example_losses_are_the_same_attack():
    net, x, y = small_net()
    expected = fgsm(net, x, y, 0.1, value_range=(0, 1))
    for reduction in ("sum", "none"):
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        assert torch.equal(fgsm(net, x, y, 0.1, value_range=(0, 1), loss_fn=loss_fn), expected)


def good_call(**changes):
    net, x, y = small_net()
    call = {"model": net, "x": x, "y": y, "eps": 0.1, "value_range": (0, 1), **changes}
    return (pgd if {"steps", "relative_step", "norm"} & set(call) else fgsm)(**call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and at least 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite and at least 0, got nan"),
        ({"eps": 1.5}, "eps must not exceed the width 1 of value_range, got 1.5"),
        (
            {"eps": torch.ones(3, 3)},
            r"eps must be a number or one number per channel, got a tensor of shape \[3, 3\]",
        ),
        (
            {"eps": [0.1, 0.2]},
            r"one value per channel .* got 2 values for inputs of shape \[6, 3, 4, 4\]",
        ),
        (
            {"eps": [0.1, 0.2], "value_range": ([0, 0, 0], 1)},
            r"agree on the number of channels, got \[2, 3\]",
        ),
        ({"value_range": (1, 0)}, r"value_range must have low < high, got \[1, 0\]"),
        ({"value_range": (0, 1, 2)}, r"value_range must be \(low, high\) or None"),
        (
            {"value_range": (0, 0.2)},
            r"inputs must lie in value_range \[0, 0.2\], got values from .* as the model sees",
        ),
        (
            {"x": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)},
            "inputs must be floating point .* got torch.uint8",
        ),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"relative_step": 0.0}, "relative_step must be positive"),
        ({"norm": "l_1"}, "norm must be 'l_inf' or 'l_2', got 'l_1'"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        good_call(**changes)


def test_the_range_must_be_stated():
    net, x, y = small_net()
    with pytest.raises(TypeError, match="value_range"):
        fgsm(net, x, y, 0.1)


@pytest.mark.parametrize("cut", [lambda x: x.detach(), lambda x: torch.zeros_like(x)])
def test_a_loss_without_the_input_is_refused(cut):
    class Cut(nn.Linear):
        def forward(self, inputs):
            return super().forward(cut(inputs))

    with pytest.raises(ValueError, match="the loss does not depend on the inputs"):
        fgsm(Cut(2, 2), torch.rand(3, 2), torch.tensor([0, 1, 0]), 0.1, value_range=(0, 1))
    with pytest.raises(ValueError, match="the loss does not depend on the inputs"):
        fgsm(
            nn.Linear(2, 2),
            torch.rand(3, 2),
            torch.rand(3, 2),
            0.1,
            value_range=(0, 1),
            loss_fn=lambda outputs, targets: mse_loss(targets, 0 * targets),
        )
