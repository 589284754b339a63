"""The geometry of an optimizer: its preconditioner P, and where its steps are stable.

On a quadratic with Hessian H, steps of rate eta along P^-1 times an averaged gradient are stable
while

    eta * (top eigenvalue of P^-1 H) < threshold.

With momentum m, dampening d and decay rates (b1, b2), for a P that stands still:

    optimizer                        P                           threshold
    SGD                              I                           2 (1 + m) / (1 - d)
    SGD, Nesterov                    I                           2 (1 + m) / (1 + 2 m)
    Adam, AdamW (also AMSGrad)       sqrt(v_hat) + eps           2 (1 + b1) / (1 - b1)
    RMSprop (its momentum is heavy)  sqrt(v) + eps               2 (1 + m)
    LARS, CLARS                      1 / ratio of the layer      as SGD
    LAMB                             (sqrt(v_hat) + eps) / ratio as Adam

At the edge every step turns the displacement round: w_(t+1) = -w_t solves the recursion, and that
gives the thresholds. With the averaged momentum of Adam it is the bound of Cohen et al., "Adaptive
gradient methods at the edge of stability", arXiv:2207.14484. tests/curvature/test_geometry.py
compares each with the rate at which the optimizer itself diverges.

- Weight decay b that is added to the gradient is added to the matrix: H + b I in place of H.
- Decoupled decay (AdamW, LAMB) shrinks the weights by eta b in each step, so that 2 - eta b stands
  in place of the 2 (LAMB: eta b times the ratio). It pulls every other mode towards 0 and has no
  edge of its own.
- Where rates or thresholds differ from group to group, their ratios to those of the first group
  with a rate are part of P^-1. One number, rate * lambda, then tells how near the edge is.

Adam divides its first moment by 1 - b1^t, which raises its first steps; the threshold is that of
later ones. Clipping of gradients, inside or outside of the optimizer, is not seen.

Other optimizers (Muon, sign methods, unknown ones) have no such P. Their geometry says so, and
curvature is measured along their own update (critical_rate.py). So it is before Adam's first step,
when there are no moments, and for LARS without gradients, whose ratios need them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hessianflow.curvature.geometry_rules import RULES, WRAPPERS, Rule, Scaling, known, rate_of
from hessianflow.interfaces import HessianFlowError

ALONG = 2.0
"""The threshold along an update: the loss is back where it was at twice the best rate."""


@dataclass(frozen=True)
class OptimizerGeometry:
    """The preconditioner and the stable rates of an optimizer, as they are at this moment.

    Attributes:
        name: the optimizer's class, with that of a base that it steps: "SAM(SGD)".
        linear: whether the step is linear in the gradients, by a preconditioner. Otherwise
            curvature is measured along the update, and `threshold` is 2.
        threshold: steps are stable while rate * (top eigenvalue of P^-1 H) is below it.
        rate: learning rate of the first group whose rate is not 0; 0 if there is none.
        rates: learning rate of every group; 1 for one that has none, whose rates are then multiples
            of its step.
        note: what does not hold, or holds only in part; empty if there is nothing to say.
        parameters: trainable parameters of the optimizer, in its order.
    """

    name: str
    linear: bool
    threshold: float
    rate: float
    rates: tuple[float, ...]
    note: str
    parameters: tuple[Tensor, ...] = field(repr=False)
    _scalings: Mapping[Tensor, Scaling] = field(repr=False)

    def edge_share(self, sharpness: float) -> float:
        """Return the share of the threshold in use under this top eigenvalue of P^-1 H."""
        return self.rate * sharpness / self.threshold

    def inverse(self, parameter: Tensor) -> Tensor | float:
        """Return the diagonal of P^-1: in the parameter's shape, or as one factor.

        It is 0 for a parameter that the optimizer does not move.
        """
        scaling = self._scalings.get(parameter)
        if scaling is None:
            return 0.0
        return scaling.inverse

    def preconditioner(self, parameter: Tensor) -> Tensor | None:
        """Return the diagonal of P as a vector, shape [numel], or None for the identity."""
        inverse = self.inverse(parameter)
        if isinstance(inverse, Tensor):
            return inverse.reshape(-1).reciprocal()
        if inverse == 1:
            return None
        return 1 / parameter.new_full((parameter.numel(),), inverse, requires_grad=False)

    def inverse_root(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return the diagonal of P^-1/2 over these parameters, shape [size]; None: the identity."""
        inverses = [self.inverse(parameter) for parameter in parameters]
        if all(isinstance(inverse, float) and inverse == 1 for inverse in inverses):
            return None
        return _spread(inverses, parameters, dtype).sqrt_()

    def decay(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor | float:
        """Return the decay that is added to the Hessian: a number, or a vector of shape [size]."""
        decays = [_decay(self._scalings.get(parameter)) for parameter in parameters]
        if len(set(decays)) == 1:
            return decays[0]
        return _spread(decays, parameters, dtype)


def optimizer_geometry(optimizer: Optimizer) -> OptimizerGeometry:
    """Return the preconditioner of an optimizer and the threshold of its stable rates.

    Subclasses count as the class that they are derived from, unless they have a `step` of their
    own. SAM and Extrapolation have the geometry of the optimizer that they step. The geometry holds
    for the state of this moment: make it anew after a step.

    Args:
        optimizer: any optimizer. One whose geometry is not known, or not yet, is not refused:
            `linear` is then False, and `note` says why.

    Raises:
        HessianFlowError: it is no optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> geometry = optimizer_geometry(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
        >>> geometry.threshold
        3.8
        >>> round(geometry.edge_share(19.0), 2)  # with a top eigenvalue of 19
        0.5
    """
    base, notes = stepped_base(optimizer)
    rates = tuple(rate_of(group) for group in base.param_groups)
    position = _reference(rates)
    trainable = _trainable(base)
    scalings, note = _scalings_of(base)
    if note:
        notes.append(note)
    threshold = ALONG
    relative: dict[Tensor, Scaling] = {}
    if not note:
        threshold = _threshold_of(base, position, scalings)
        relative = _made_relative(base, scalings, rates[position], threshold)
    return OptimizerGeometry(
        name=_name(optimizer),
        linear=not note,
        threshold=threshold,
        rate=rates[position],
        rates=rates,
        note="; ".join(notes),
        parameters=trainable,
        _scalings=relative,
    )


def reference_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of the first group whose rate is not 0; 0 if there is none.

    Raises:
        HessianFlowError: it is no optimizer.
    """
    base, _ = stepped_base(optimizer)
    rates = [rate_of(group) for group in base.param_groups]
    return rates[_reference(rates)]


def _reference(rates: Sequence[float]) -> int:
    # nan must not pass as 0: shares are then nan, too.
    return next((i for i, rate in enumerate(rates) if rate > 0 or math.isnan(rate)), 0)


def stepped_base(optimizer: Optimizer) -> tuple[Optimizer, list[str]]:
    """Return the optimizer that SAM or Extrapolation step, and what its geometry leaves out.

    Any other optimizer is returned itself.

    Raises:
        HessianFlowError: it is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise HessianFlowError(
            f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}"
        )
    notes = []
    note = known(type(optimizer), WRAPPERS)
    while note is not None:
        notes.append(note)
        optimizer = optimizer.base  # type: ignore[attr-defined]
        note = known(type(optimizer), WRAPPERS)
    return optimizer, notes


def _scalings_of(optimizer: Optimizer) -> tuple[dict[Tensor, Scaling], str]:
    """Return how each trainable parameter is stepped, or why that cannot be said."""
    name = type(optimizer).__name__
    rule = known(type(optimizer), RULES)
    if rule is None:
        return {}, f"{name} has no known preconditioner: curvature is measured along its update"
    if any(group.get("maximize") for group in optimizer.param_groups):
        return {}, f"{name} maximizes: curvature is measured along its update"
    scalings: dict[Tensor, Scaling] = {}
    with torch.no_grad():
        for group in optimizer.param_groups:
            found = rule(optimizer, group)
            scalings.update((p, scaling) for p, scaling in found.items() if p.requires_grad)
    if not scalings:
        return {}, f"{name} has {_missing(rule)} yet: curvature is measured along its update"
    return scalings, ""


def _missing(rule: Rule) -> str:
    if rule is RULES["hessianflow.optim.lars.LARS"]:
        return "no gradients for its ratios"
    return "no moments, because it has not stepped"


def _threshold_of(optimizer: Optimizer, position: int, scalings: Mapping[Tensor, Scaling]) -> float:
    """Return the threshold of the first parameter of a group, or of any if the group has none."""
    own = [p for p in optimizer.param_groups[position]["params"] if p in scalings]
    first = next(iter([*own, *scalings]))
    return scalings[first].threshold


def _made_relative(
    optimizer: Optimizer, scalings: Mapping[Tensor, Scaling], rate: float, threshold: float
) -> dict[Tensor, Scaling]:
    """Fold each parameter's rate and threshold, relative to the reference ones, into P^-1."""
    relative = {}
    for group in optimizer.param_groups:
        rate_share = 1.0
        if rate > 0:
            rate_share = rate_of(group) / rate
        for parameter in group["params"]:
            if parameter in scalings:
                scaling = scalings[parameter]
                share = rate_share * (threshold / scaling.threshold)
                relative[parameter] = scaling._replace(inverse=scaling.inverse * share)
    return relative


def _trainable(optimizer: Optimizer) -> tuple[Tensor, ...]:
    groups = optimizer.param_groups
    return tuple(p for group in groups for p in group["params"] if p.requires_grad)


def _name(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    if known(type(optimizer), WRAPPERS) is None:
        return name
    return f"{name}({_name(optimizer.base)})"  # type: ignore[attr-defined]


def _decay(scaling: Scaling | None) -> float:
    if scaling is None:
        return 0.0
    return scaling.decay


def _spread(
    values: Iterable[Tensor | float], parameters: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Return one value for each weight as a flat vector."""
    size = sum(parameter.numel() for parameter in parameters)
    flat = torch.empty(size, dtype=dtype, device=parameters[0].device)
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    for piece, value in zip(pieces, values, strict=True):
        if isinstance(value, Tensor):
            piece.copy_(value.reshape(-1))
        else:
            piece.fill_(value)
    return flat
