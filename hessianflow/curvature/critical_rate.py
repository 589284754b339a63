"""The largest learning rate along the optimizer's own update at which the loss does not rise.

With the displacement eta u that the optimizer would make at rate eta, for any optimizer,

    L(w - s eta u) = L - s eta g.u + (s eta)^2 / 2 u.H u - ...,
    best rate  g.u / u.H u,        critical rate  2 g.u / u.H u.

At the critical rate the loss is back where it started. 2 / (critical rate) is the curvature as this
optimizer meets it, called critical sharpness where forward passes measure it (arXiv:2601.16979);
for gradient descent it is 2 / (critical rate) = g.H g / g.g. It stands in for the top eigenvalue
where the optimizer has no preconditioner, and is cheaper where it has one.

Two forms:

- "product": one Hessian product, on the graph that gives the gradient.
- "forward": at most ten forward passes, and no second derivative. It looks for the root of
  (L(w - s eta u) - L(w)) / s, which is a straight line in s on a quadratic. The slope g.u is its
  value at 0, so the second trial is already the answer there; where the loss is no quadratic, the
  root is bracketed and closed in on (regula falsi in the Illinois form). Two more passes, a little
  to both sides of the weights, give u.H u as a difference.

The first form sees the curvature at the weights, the root the loss as far as the critical rate is.
Where the loss is no quadratic so far they differ: on ResNet-8 by factors of 0.9 to 1.76. The
difference agrees with the product to a percent on a new network; later the kinks of rectified
units, which no second derivative sees, add 5 to 31 % to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hessianflow.checks import check_choice
from hessianflow.curvature.crossing import crossing
from hessianflow.curvature.displacement import displacement
from hessianflow.curvature.geometry import ALONG, reference_rate
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.loss_line import LossLine
from hessianflow.curvature.sharded_loss import by_first_derivatives
from hessianflow.curvature.vectors import estimating, flatten
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.measuring import measuring, unwrap
from hessianflow.sharding import own_part

Form = Literal["product", "forward"]

MOST_TRIALS = 7
"""Most passes for the root, so that those at the weights and to both sides of them make ten."""
CLIMBS = "the update climbs"
FALLS = "the loss only falls along the update"


@dataclass(frozen=True)
class CriticalRate:
    """The critical rate along one update.

    Attributes:
        rate: the rate in force: that of the first group whose rate is not 0.
        critical: the rate at which the loss is back where it started. Infinite if it only falls
            (negative curvature, or no rise within the passes), 0 if the update climbs from the
            start, nan if the update is 0 or not finite.
            In the form "product" it is that of the parabola at the weights.
        slope: g.d for the displacement d = w - w' of the step at the rate in force.
        curvature: d.H d; in the form "forward" a difference, nan if there was no critical rate.
        products: Hessian products spent.
        passes: forward passes spent to look for the critical rate.
        note: why `critical` is no positive number; empty if it is.
    """

    rate: float
    critical: float
    slope: float
    curvature: float
    products: int = 0
    passes: int = 0
    note: str = ""

    @property
    def local(self) -> float:
        """Return the critical rate of the parabola at the weights, in either form."""
        if self.slope > 0 and self.curvature <= 0:
            return math.inf
        if self.slope <= 0:
            return self.critical
        return self.rate * ALONG * self.slope / self.curvature

    @property
    def best(self) -> float:
        """Return the rate at which the loss falls most, on a quadratic: half the critical one."""
        return self.critical / 2

    @property
    def sharpness(self) -> float:
        """Return the curvature along the update, 2 / (critical rate): u.H u / g.u."""
        if self.critical == 0:
            return math.inf
        return ALONG / self.critical

    @property
    def edge_share(self) -> float:
        """Return the share of the critical rate in use."""
        return self.rate * self.sharpness / ALONG


@runtime_checkable
class UpdateOperator(Protocol):
    """A Hessian of a model's weights that gives the gradient with it."""

    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Return the parameters in the order of the vectors."""
        ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector of shape [size]."""
        ...

    def kept_gradient(self) -> Tensor:
        """Return the gradient, shape [size], from the graph of the products."""
        ...


def critical_rate(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: Optimizer,
    *,
    form: Form = "product",
    norm_mode: NormMode = "batch",
    microbatch_size: int | None = None,
    use_grad: bool = False,
) -> CriticalRate:
    """Return the critical rate along the optimizer's next update.

    The update is the step that a copy of the optimizer makes with the gradient of this batch. The
    optimizer, its state, the weights and the random generators are left as they were, bit for bit.

    Cost: "product" takes one Hessian product that builds its graph (with microbatches the gradient
    is computed before it); "forward" takes a gradient, unless `use_grad`, and at most ten forward
    passes. At most two vectors of the size of the weights are held beside the graph, one more than
    the gradient: gradient and displacement, then displacement and product or the weights to be put
    back. displacement.py says which optimizers take more for their step.

    Args:
        model: the model; wrappers are removed.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for a dict batch.
        batch: a pair (inputs, targets) or a dict.
        optimizer: any optimizer that steps without a closure; SAM and Extrapolation are measured
            along the step of their base.
        form: see the module. "forward" also works if `fully_shard` (FSDP2) shards the model. All
            ranks then call together, each with its share of the batch or all with the same batch.
            They get the rate over all examples, along updates of torch's SGD, Adam, AdamW, RMSprop.
        norm_mode: statistics of batch normalisation. The default is that of the function which is
            trained, unlike that of the operators.
        microbatch_size: examples per pass; None for all at once.
        use_grad: step along the gradients that the parameters hold (`.grad`), as between
            `backward()` and `step()` in a loop. They should be those of the batch, not scaled.

    Raises:
        HessianFlowError: the optimizer cannot be stepped, or as HessianOperator raises
            (:class:`~hessianflow.curvature.operator.NonFiniteError` for a loss that is nan).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1))] * 3
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for inputs, targets in data:
        ...     nn.functional.mse_loss(model(inputs), targets).backward()
        ...     now = critical_rate(model, nn.MSELoss(), (inputs, targets), optimizer)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> 0.5 <= now.critical <= 2.0  # between 2 / 4 and 2 / 1: the Hessian is diag(1, 4)
        True
    """
    check_choice("form", form, get_args(Form))
    make: Callable[..., HessianOperator] = HessianOperator
    if form == "forward":
        make = by_first_derivatives
    operator = make(
        model,
        loss_fn,
        batch,
        norm_mode=norm_mode,
        microbatch_size=microbatch_size,
        check_deterministic=False,
    )
    try:
        rate = reference_rate(optimizer)
        if use_grad:
            gradient = held_gradient(operator)
        elif form == "product":
            gradient = operator.kept_gradient()
        else:
            gradient = operator.gradient()
        along = _along(operator, unwrap(model), optimizer, gradient, operator.over_ranks)
        del gradient
        if along.note:
            return CriticalRate(rate, math.nan, along.slope, math.nan, note=along.note)
        if form == "forward":
            return _by_passes(operator, along.moved, rate, along.slope)
        return _by_product(operator, along.moved, rate, along.slope)
    finally:
        operator.release()


def critical_rate_on(
    operator: UpdateOperator, model: nn.Module, optimizer: Optimizer
) -> CriticalRate:
    """Return the critical rate of an operator's loss by one product, as :func:`critical_rate`."""
    rate = reference_rate(optimizer)
    along = _along(operator, model, optimizer, operator.kept_gradient(), lambda numbers: numbers)
    if along.note:
        return CriticalRate(rate, math.nan, along.slope, math.nan, note=along.note)
    return _by_product(operator, along.moved, rate, along.slope)


class _Along(NamedTuple):
    """A displacement, its product with the gradient, and why it cannot be measured along."""

    moved: Tensor
    slope: float
    note: str


def _along(
    operator: UpdateOperator,
    model: nn.Module,
    optimizer: Optimizer,
    gradient: Tensor,
    over_ranks: Callable[[Tensor], Tensor],
) -> _Along:
    with measuring(model), estimating(operator):
        moved = displacement(optimizer, operator.parameters, gradient)
        numbers = torch.stack([torch.dot(gradient, moved), moved.norm()])
        slope, length = over_ranks(numbers).tolist()  # one wait for the device
    note = ""
    if length == 0:
        note = "the update is zero"
    if not math.isfinite(slope) or not math.isfinite(length):
        note = "the update is not finite"
    return _Along(moved, slope, note)


def held_gradient(operator: HessianOperator) -> Tensor:
    """Return the gradients that the operator's parameters hold, shape [size].

    Raises:
        HessianFlowError: none of them holds one.
    """
    parts = [own_part(parameter) for parameter in operator.parameters]
    gradients = [p.grad if p.grad is None else own_part(p.grad) for p in operator.parameters]
    if all(gradient is None for gradient in gradients):
        raise HessianFlowError(
            "use_grad takes the gradients that the parameters hold, but none has one: call"
            " backward() first"
        )
    return flatten(gradients, parts, operator.dtype)


def _by_product(operator: UpdateOperator, moved: Tensor, rate: float, slope: float) -> CriticalRate:
    with estimating(operator):
        # In weights of 16 bits a small displacement would vanish. A power of two changes no bit.
        exponent = max(math.frexp(float(moved.norm()))[1], -100)
        moved.mul_(2.0**-exponent)
    product = operator.matvec(moved)
    with estimating(operator):
        curvature = math.ldexp(float(torch.dot(moved, product)), 2 * exponent)
    if not math.isfinite(curvature):
        note = "the curvature along the update is not finite"
        return CriticalRate(rate, math.nan, slope, curvature, products=1, note=note)
    if slope <= 0:
        return CriticalRate(rate, 0.0, slope, curvature, products=1, note=CLIMBS)
    if curvature <= 0:
        return CriticalRate(rate, math.inf, slope, curvature, products=1, note=FALLS)
    return CriticalRate(rate, rate * ALONG * slope / curvature, slope, curvature, products=1)


def _by_passes(operator: HessianOperator, moved: Tensor, rate: float, slope: float) -> CriticalRate:
    if slope <= 0:
        return CriticalRate(rate, 0.0, slope, math.nan, note=CLIMBS)
    with LossLine(operator, moved, slope) as line:
        # At a rate far from the critical one, the first step that tells anything is a longer one.
        first = max(1.0, line.rounding / slope)
        scale = crossing(line.rise, -slope, MOST_TRIALS, first=first, error=line.rounding)
        if scale == math.inf:
            return CriticalRate(rate, scale, slope, math.nan, passes=line.passes, note=FALLS)
        curvature = line.curvature(scale)
    return CriticalRate(rate, rate * scale, slope, curvature, passes=line.passes)
