"""Adversarial attacks as pure functions of model, inputs and targets.

- FGSM (Goodfellow, Shlens, Szegedy, arXiv 1412.6572, section 4):  x' = x + eps * sign(dL/dx).
- FGSM with random start (Wong, Rice, Kolter, arXiv 2001.03994):  start at x + U(-eps, eps), step by
  1.25 eps, project back.
- PGD (Madry et al., arXiv 1706.06083):  repeat x' = project(x' + step * direction), where the
  direction is the sign of the gradient in l_inf and the normalised gradient in l_2.

All are one loop, and differ in start, step and number of steps. The following are our choices. The
user gives the valid range, which is never taken from the batch: a batch that spans its own range
could not be perturbed at its extremes. Steps are fractions of eps, so that an eps per channel keeps
its meaning. The last iterate is returned. The gradient is that of the summed loss, so that it does
not depend on the number of examples.

An attack leaves no trace in modes, statistics, `.grad`, `requires_grad` and random generators. It
freezes the parameters, so that only the gradient with respect to the inputs is computed and kept.
Run it inside `torch.autocast` to attack in mixed precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessianflow.adversarial.budget import (
    Budget,
    Norm,
    PerChannel,
    ValueRange,
    broadcast_to,
    check_in_range,
    make_budget,
)
from hessianflow.checks import check_choice, check_count, is_number
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import mean_loss
from hessianflow.measuring import measuring
from hessianflow.normalisation.fixed import fixed_normalisation


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: PerChannel,
    *,
    value_range: ValueRange | None,
    loss_fn: LossFn = cross_entropy,
    random_start: bool = False,
    norm_mode: NormMode = "eval",
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take one step along the sign of the input gradient:  x' = clamp(x + eps * sign(dL/dx)).

    Args:
        model: Model whose output `loss_fn` takes; wrapped models are unwrapped.
        x: Inputs, floating point, shape [N, ...].
        y: Targets, shape [N, ...]; class probabilities for soft labels. With `targeted`, the
            targets to move towards.
        eps: Largest change of a component, in the units of `x`, one number or one per channel (eps
            / std for inputs normalised by std).
        value_range: Smallest and largest valid value of `x`, each one number or one per channel;
            None stands for no clamping.
        loss_fn: Loss that the attack raises, usually the trained one.
        random_start: Start at a random point of the ball, step by 1.25 eps and project back (Wong
            et al., 2020).
        norm_mode: Statistics of batch normalisation during the attack. "eval" uses the running
            ones, "batch" those of `x`; neither updates the running ones.
        targeted: Lower the loss instead of raising it.
        generator: Source of the random start; None stands for fresh entropy. The global generators
            are never used.

    Returns:
        The perturbed inputs, detached; `x` is not changed.

    Raises:
        HessianFlowError: eps is negative, not finite or wider than the range, the inputs are
            integers or lie outside the range, or the loss does not depend on them.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> fgsm(layer, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.005, value_range=(0, 1))
        tensor([[0.4950, 0.5050]])
    """
    return pgd(
        model,
        x,
        y,
        eps,
        value_range=value_range,
        steps=1,
        relative_step=fgsm_step(random_start),
        loss_fn=loss_fn,
        random_start=random_start,
        norm_mode=norm_mode,
        targeted=targeted,
        generator=generator,
    )


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: PerChannel,
    *,
    value_range: ValueRange | None,
    steps: int = 10,
    relative_step: float | None = None,
    norm: Norm = "l_inf",
    loss_fn: LossFn = cross_entropy,
    random_start: bool = True,
    norm_mode: NormMode = "eval",
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ascend the loss by projected gradient steps within a ball around the inputs.

    It repeats x' = clamp(project(x' + relative_step * eps * direction)) `steps` times. The
    direction is sign(g) in l_inf and g / ||g|| in l_2; for an eps per channel it is the steepest
    direction in units of eps. The arguments that are not described here are those of :func:`fgsm`.

    Args:
        eps: Radius of the ball, one number or one per channel. In l_2 the norm of delta / eps over
            all components of an example is at most 1.
        steps: Gradient steps. This default is our choice.
        relative_step: Step size in units of eps; None stands for 2.5 / steps, which suffices to
            reach the far side of the ball. This default is our choice.
        norm: "l_inf" or "l_2".
        random_start: Start at a random point of the ball (Madry et al.).

    Returns:
        The perturbed inputs, detached; `x` is not changed.

    Raises:
        HessianFlowError: As :func:`fgsm`, or if steps < 1 or relative_step is not positive.
    """
    step = resolve_step(steps, relative_step)
    budget = broadcast_to(make_budget(eps, value_range, norm), x)
    check_in_range(budget, x)
    start = x.detach()
    if random_start:
        start = random_point(budget, x, generator)
    with attacking(model, norm_mode) as frozen:
        return ascend(
            frozen, x, y, budget, loss_fn, steps=steps, step=step, start=start, targeted=targeted
        )


@contextmanager
def attacking(model: nn.Module, norm_mode: NormMode) -> Iterator[nn.Module]:
    """Yield the unwrapped model in measuring mode, with its parameters frozen."""
    check_choice("norm_mode", norm_mode, get_args(NormMode))
    with measuring(model, norm_mode) as inner:
        for parameter in inner.parameters():
            parameter.requires_grad_(False)
        with fixed_normalisation(inner) as fixed:
            yield fixed


def ascend(
    frozen: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    loss_fn: LossFn,
    *,
    steps: int,
    step: float,
    start: Tensor,
    targeted: bool = False,
) -> Tensor:
    """Run the loop behind every attack, on a model from :func:`attacking`.

    It begins at `start`, shaped like `x`; `step` is in units of eps. What is not described here is
    that of :func:`pgd`.
    """
    x = x.detach()
    perturbed = start
    if targeted:
        step = -step
    for _ in range(steps):
        gradient = input_gradient(frozen, perturbed, y, loss_fn)
        perturbed = budget.project(perturbed + step * budget.ascent(gradient), x)
    return perturbed


def input_gradient(frozen: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Return the gradient of the summed loss with respect to the inputs, shaped like `x`.

    Raises:
        HessianFlowError: No path leads from the loss back to the inputs.
    """
    layout = torch.preserve_format
    if x.ndim == 4 and x.device.type == "cpu":
        # On a CPU, convolutions run faster on images with the channels last, whatever the layout of
        # the weights.
        layout = torch.channels_last
    # A clone, because a tensor made in inference mode cannot take part in a graph.
    leaf = x.detach().clone(memory_format=layout).requires_grad_()
    loss = mean_loss(loss_fn, frozen(leaf), y) * len(x)
    gradient: Tensor | None = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    if gradient is None:
        raise HessianFlowError(
            "the loss does not depend on the inputs, so they cannot be attacked; the model must be"
            " differentiable from input to loss (no detach, no_grad or rounding on the way)"
        )
    return gradient


def check_gradient(frozen: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> None:
    """Refuse a loss whose input gradient is zero everywhere, so that no attack changes anything.

    Such a loss is cross-entropy over a single output.
    """
    if not bool(input_gradient(frozen, x, y, loss_fn).any()):
        raise HessianFlowError(
            "the gradient of the attack's loss by the inputs is zero everywhere, so nothing is"
            " perturbed; give it the loss that is trained on (loss_fn=)"
        )


def random_point(budget: Budget, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a random point of the ball around `x`; without a generator, from fresh entropy."""
    if generator is None:
        generator = torch.Generator(device=x.device)
        generator.seed()
    return budget.clamp(x.detach() + budget.random(x, generator))


def fgsm_step(random_start: bool) -> float:
    """Return the step of FGSM in units of eps, longer from a random start (Wong et al.)."""
    return 1.25 if random_start else 1.0


def resolve_step(steps: int, relative_step: float | None) -> float:
    """Return the step in units of eps, after a check of the steps and of its size."""
    check_count("steps", steps)
    if relative_step is None:
        return 2.5 / steps
    if not is_number(relative_step) or not 0 < relative_step < float("inf"):
        raise HessianFlowError(
            f"relative_step must be positive and finite (in units of eps), got {relative_step}"
        )
    return relative_step
