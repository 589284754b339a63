"""Adversarial attacks as pure functions: model, inputs and targets in, perturbed inputs out.

FGSM (Goodfellow, Shlens, Szegedy, arXiv 1412.6572, section 4):  x' = x + eps * sign(dL/dx). FGSM
with random start (Wong, Rice, Kolter, arXiv 2001.03994):  start at x + U(-eps, eps), step 1.25 eps,
project back. PGD (Madry et al., arXiv 1706.06083):  repeat x' = project(x' + step * ascent
direction), where the direction is the sign of the gradient in l_inf and the normalised gradient in
l_2.

All are one loop; they differ in start, step and number of steps. Choices of ours: the valid range
is given by the user and never taken from the batch (a batch that spans its own range could not be
perturbed at its extremes); steps are fractions of eps, so that an eps per channel keeps its
meaning; the last iterate is returned. The gradient is that of the summed loss, in which examples do
not weigh each other down.

The attack leaves no trace: modes, statistics, `.grad`, `requires_grad` and random generators are as
found. Parameters are frozen meanwhile, so nothing but the gradient with respect to the input is
computed or kept. Run it inside `torch.autocast` to attack in mixed precision.
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
    check_in_range,
    make_budget,
    place,
)
from hessianflow.checks import check_choice, check_count, is_number
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import mean_loss
from hessianflow.measuring import measuring
from hessianflow.normalisation.fixed import fixed_normalisation

FAST_RANDOM_STEP = 1.25
"""Step of FGSM with random start, in units of eps (Wong et al.)."""


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
    """One step along the sign of the input gradient:  x' = clamp(x + eps * sign(dL/dx)).

    Args:
        model: maps inputs to whatever `loss_fn` takes; wrapped models are unwrapped.
        x: inputs, floating point, shape [N, ...].
        y: targets, shape [N, ...]; class probabilities for soft labels. With `targeted`, the
            targets to move towards.
        eps: largest change of a component, in the units of `x`: one number or one per channel (eps
            / std for inputs normalised by std).
        value_range: (smallest, largest) valid value of `x`, each one number or one per channel;
            None: do not clamp.
        loss_fn: the loss to raise; use the one trained on.
        random_start: start at a random point of the ball, step 1.25 eps and project back (Wong et
            al., 2020).
        norm_mode: statistics used by batch normalisation during the attack: "eval" the running
            ones, "batch" those of `x`. Neither moves the running ones.
        targeted: lower the loss instead of raising it.
        generator: source of the random start; None: fresh entropy. The global generators are never
            used.

    Returns:
        The perturbed inputs, detached; `x` is not changed.

    Raises:
        HessianFlowError: an eps that is negative, not finite or wider than the range; inputs that
            are integers or lie outside the range; a loss that does not depend on the inputs.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> fgsm(layer, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.005, value_range=(0, 1))
        tensor([[0.4950, 0.5050]])
    """
    step = FAST_RANDOM_STEP if random_start else 1.0
    budget = place(make_budget(eps, value_range, "l_inf"), x)
    check_in_range(budget, x)
    start = random_deltas(budget, x, generator) if random_start else None
    with attacking(model, norm_mode) as frozen:
        return ascend(
            frozen, x, y, budget, loss_fn, steps=1, step=step, start=start, targeted=targeted
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
    """Projected gradient ascent on the loss within a ball around the inputs.

    x' = clamp(project(x' + relative_step * eps * direction)), `steps` times; direction: sign(g) in
    l_inf, g / ||g|| in l_2 (for an eps per channel: the steepest direction in units of eps). See
    :func:`fgsm` for what is not said here.

    Args:
        model: maps inputs to whatever `loss_fn` takes.
        x: inputs, shape [N, ...].
        y: targets, shape [N, ...].
        eps: radius of the ball, one number or one per channel. In l_2 the norm is that of delta /
            eps over all components of an example, at most 1.
        value_range: (smallest, largest) valid value; None: do not clamp.
        steps: gradient steps (default ours).
        relative_step: step size in units of eps; None: 2.5 / steps, enough to reach the far side of
            the ball (ours).
        norm: "l_inf" or "l_2".
        loss_fn: the loss to raise.
        random_start: start at a random point of the ball (Madry et al.).
        norm_mode: batch-normalisation statistics during the attack.
        targeted: lower the loss instead of raising it.
        generator: source of the random start; None: fresh entropy.

    Returns:
        The perturbed inputs, detached.

    Raises:
        HessianFlowError: as :func:`fgsm`; also steps < 1 or a relative_step that is not positive.
    """
    step = resolve_step(steps, relative_step)
    budget = place(make_budget(eps, value_range, norm), x)
    check_in_range(budget, x)
    start = random_deltas(budget, x, generator) if random_start else None
    with attacking(model, norm_mode) as frozen:
        return ascend(
            frozen, x, y, budget, loss_fn, steps=steps, step=step, start=start, targeted=targeted
        )


@contextmanager
def attacking(model: nn.Module, norm_mode: NormMode) -> Iterator[nn.Module]:
    """The unwrapped model in measuring mode with its parameters frozen: only input gradients are
    computed.

    Raises:
        HessianFlowError: a norm_mode that does not exist.
    """
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
    start: Tensor | None = None,
    targeted: bool = False,
) -> Tensor:
    """Run the loop behind every attack; `frozen` comes from :func:`attacking`, `budget` from
    `place`.

    Args:
        start: first delta, shaped like `x`; None: zero.
        step: step size in units of eps.
    """
    x = x.detach()
    perturbed = x if start is None else budget.clamp(x + start)
    signed = -step if targeted else step
    for _ in range(steps):
        gradient = input_gradient(frozen, perturbed, y, loss_fn)
        perturbed = budget.project(perturbed + signed * budget.ascent(gradient), x)
    return perturbed


def input_gradient(frozen: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Return the gradient of the summed loss with respect to the inputs, shaped like `x`.

    Raises:
        HessianFlowError: no path leads from the loss back to the inputs.
    """
    # clone: a tensor made in inference mode cannot take part in a graph. On a CPU, convolutions run
    # faster on images with the channels last, whatever the layout of the weights.
    images_on_cpu = x.ndim == 4 and x.device.type == "cpu"
    layout = torch.channels_last if images_on_cpu else torch.preserve_format
    leaf = x.detach().clone(memory_format=layout).requires_grad_()
    loss = mean_loss(loss_fn, frozen(leaf), y) * len(x)
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise HessianFlowError(
            "the loss does not depend on the inputs, so they cannot be attacked; the model must be"
            " differentiable from input to loss (no detach, no_grad or rounding on the way)"
        )
    return gradient


def check_gradient(frozen: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> None:
    """Refuse a loss whose gradient by the inputs is zero everywhere: no attack with it could change
    anything.

    Raises:
        HessianFlowError: cross-entropy over a single output, for one.
    """
    if not bool(input_gradient(frozen, x, y, loss_fn).any()):
        raise HessianFlowError(
            "the gradient of the attack's loss by the inputs is zero everywhere, so nothing is"
            " perturbed; give it the loss that is trained on (loss_fn=)"
        )


def random_deltas(budget: Budget, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random start within the ball; fresh entropy without a generator."""
    if generator is None:
        generator = torch.Generator(device=x.device)
        generator.seed()
    return budget.random(x, generator)


def resolve_step(steps: int, relative_step: float | None) -> float:
    """Return the step in units of eps.

    Raises:
        HessianFlowError: steps that are no whole number >= 1, or a step that is not positive.
    """
    check_count("steps", steps)
    if relative_step is None:
        return 2.5 / steps
    if not is_number(relative_step) or not 0 < relative_step < float("inf"):
        raise HessianFlowError(
            f"relative_step must be positive and finite (in units of eps), got {relative_step}"
        )
    return relative_step
