"""A comparison of one product with a difference of gradients, which finds faults no graph shows.

Products come from second derivatives that torch, the model and the loss provide. A function that
hides intermediates from autograd, a hook on an activation, or a module that is detached or computes
its own gradients makes a matrix that is symmetric, plausible and wrong. A small step of the weights
reveals it:

    Hessian:       (L(w + s v) - L(w)) / s -> g^T v,  (g(w + s v) - g(w)) / s -> H v
    Gauss-Newton:  the same for L, the outputs, and the slope of the loss by the outputs
    Fisher:        the same for L and the losses of the examples

The choices below are ours and keep healthy models from being refused
(experiments/benchmarks/differences.py counts refusals):

- The weights are copied to float64 and few examples are used. In float32 any step large enough to
  rise above rounding carries thousands of rectified units over their kinks, and the difference
  measures the kinks (on ResNet-20 it is off by a factor of 1 to 30). In float64 a step of 1e-6 or
  1e-8 crosses no kink. A model that does not run in float64 is not checked.
- The comparison is made a thousandth away from the current weights, in a random direction. At the
  start of training biases are 0, and so are the borders of many images: units then sit exactly on
  their kinks, where the derivative is a matter of convention.
- The vector is random, each tensor of weights in its own scale, and several step lengths are tried;
  one that agrees is enough. Embedding rows for padding do not move: torch treats them as constants
  (`padding_idx`), although the loss may depend on them.
- Where no step agrees, the differences must agree among themselves before they count. Those of
  continuous quantities must agree over all steps; those of gradients, which jump at kinks, over two
  steps at which the loss moves as its gradient says. A model that rounds internally (16 bits,
  straight-through estimators) does not move at all for a small step, and is not checked.
- Each tensor of the gradient is compared, so that a larger tensor cannot hide a fault in a layer.

The model's own tensors are left alone: copies stand in for them (copies.py), and a kept graph stays
valid.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors
from hessianflow.curvature.copies import copied, widened
from hessianflow.curvature.vectors import unflatten

# The constants here are our choices.
EXAMPLES = 4  # examples of the batch that are used: faults are in operations, not in examples
SHIFT = 1e-3  # distance from the weights to the point of comparison, relative to the weights
_STEPS = (1e-6, 1e-8, 1e-4, 1e-3, 1e-2)  # lengths relative to the weights, the likeliest first
_LONG = 1e-3  # the longest step that has to agree: over longer ones a vector may curve
# The largest relative difference at which a tensor passes. Steps that agree differ by at most 1e-5.
TOLERANCE = 1e-3
SMALLEST_SHARE = 1e-4  # smaller shares of the whole are skipped: cancellation may leave them
AGREEMENT = 0.1  # largest difference of two steps that agree, relative to that from the claim
ROUGH_AGREEMENT = 0.5  # the same where all steps must agree
ROUNDINGS = 100  # machine epsilons of a vector that are put down to rounding

Vectors = list[Sequence[Tensor]]
"""Vectors, each as tensors that are compared one by one."""


class Linearised(NamedTuple):
    """The values and derivatives that a graph claims."""

    loss: Tensor  # the mean loss
    continuous: Vectors  # what depends on the weights without a jump and only bends at kinks
    jumping: Vectors  # what jumps at kinks: gradients
    along: Callable[[Tensor], tuple[Vectors, Vectors]]  # derivatives of both along a flat vector
    rounds: bool  # whether the model rounds to 16 bits, so that differences tell nothing


class Disagreement(NamedTuple):
    """A derivative that differences contradict."""

    position: int | None  # index of the worst tensor; None where there is only one
    error: float  # its error relative to the larger of claim and difference


Linearise = Callable[[Any, Sequence[Tensor]], Linearised]
"""Runs the model as it is on a batch and linearises it in some parameters; flat vectors are
float64."""


def find_disagreement(
    linearise: Linearise,
    holders: Sequence[nn.Module],
    parameters: Sequence[Tensor],
    samples: Sequence[Callable[[], Any]],
) -> Disagreement | None:
    """Compare derivatives with differences, in float64, and return the worst contradiction.

    None means that they agree, or that nothing can be told. Weights and buffers of the modules
    `holders` are copied: the model and, if it is a module, the loss. The functions `samples` return
    batches; they are tried in turn until one can be made and run.
    """
    for sample in samples:
        try:
            batch = map_tensors(widened, sample())
            with copied(holders, parameters) as copies:
                padding = _padding(holders, copies)
                return _compare(partial(linearise, batch, copies), copies, padding)
        # A model may raise anything in float64 or on a batch that it was not made for.
        except Exception:
            continue
    return None


def _compare(
    linearise: Callable[[], Linearised],
    copies: Sequence[Tensor],
    padding: Sequence[tuple[int, int]],
) -> Disagreement | None:
    _move(copies, copies, _direction(copies, padding, seed=1), SHIFT)
    base = [copy.detach().clone() for copy in copies]
    claims = linearise()
    # Where the loss is fitted to the last digit, every gradient is rounding.
    if claims.rounds or not abs(float(claims.loss)) > 1e4 * torch.finfo(torch.float64).eps:
        return None
    direction = _direction(copies, padding, seed=0)
    derivatives = claims.along(direction)
    continuous = [_Vector(*pair) for pair in zip(claims.continuous, derivatives[0], strict=True)]
    jumping = [_Vector(*pair) for pair in zip(claims.jumping, derivatives[1], strict=True)]
    del claims, derivatives  # free the graph before the weights move
    vectors = [*continuous, *jumping]
    for step in _STEPS:
        _move(copies, base, direction, step)
        moved = linearise()
        for vector, values in zip(vectors, (*moved.continuous, *moved.jumping), strict=True):
            vector.add(step, values)
        if all(vector.is_confirmed for vector in vectors):
            return None
    verdicts = [vector.disagreement() for vector in continuous if not vector.is_confirmed]
    trusted = set(_STEPS).intersection(*(vector.exact_steps() for vector in continuous))
    verdicts += [vector.disagreement(trusted) for vector in jumping if not vector.is_confirmed]
    contradictions = [verdict for verdict in verdicts if verdict is not None]
    return max(contradictions, key=lambda one: one.error, default=None)


def _move(copies: Sequence[Tensor], base: Sequence[Tensor], direction: Tensor, step: float) -> None:
    """Set the copies to the base plus a step along a flat direction."""
    with torch.no_grad():
        for copy, start, piece in zip(copies, base, unflatten(direction, copies), strict=True):
            copy.copy_(start).add_(piece, alpha=step)


class _Vector:
    """A vector of values, the derivative claimed for it, and its differences for several steps."""

    def __init__(self, values: Sequence[Tensor], claimed: Sequence[Tensor]) -> None:
        self._values = [value.detach().clone() for value in values]
        self._claimed = [tensor.detach() for tensor in claimed]
        self._size = _norm(self._values)
        self._total = _norm(self._claimed)
        self._differences: dict[float, list[Tensor]] = {}
        self.is_confirmed = False

    def add(self, step: float, values: Sequence[Tensor]) -> None:
        """Note the values after a step of this length."""
        slope = [(new.detach() - old) / step for new, old in zip(values, self._values, strict=True)]
        self._differences[step] = slope
        self.is_confirmed = self.is_confirmed or not any(self._off_by(step))

    def exact_steps(self) -> set[float]:
        """Return the steps after which the vector has moved as claimed, to within TOLERANCE."""
        return {
            step
            for step, difference in self._differences.items()
            if _norm([d - c for d, c in zip(difference, self._claimed, strict=True)])
            <= TOLERANCE * self._total
        }

    def disagreement(self, trusted: set[float] | None = None) -> Disagreement | None:
        """Return the worst tensor for which steps agree with each other but not with the claim.

        Two neighbours among the `trusted` steps must agree; without these, all steps up to _LONG
        must, and the vector must move.
        """
        offs = {step: self._off_by(step) for step in sorted(self._differences)}
        if trusted is None:
            offs = {step: off for step, off in offs.items() if step <= _LONG}
            if min(_norm(self._differences[step]) for step in offs) < TOLERANCE * self._total:
                return None
        worst: dict[int, float] = {}
        for index in range(len(self._claimed)):
            agreeing = [pair for pair in pairwise(offs) if self._agree(index, *pair, offs, trusted)]
            if agreeing and (trusted is not None or len(agreeing) == len(offs) - 1):
                worst[index] = min(offs[step][index] for step in agreeing[0])
        if not worst:
            return None
        index = max(worst, key=worst.__getitem__)
        if len(self._claimed) == 1:
            return Disagreement(None, worst[index])
        return Disagreement(index, worst[index])

    def _agree(
        self,
        index: int,
        one: float,
        other: float,
        offs: dict[float, list[float]],
        trusted: set[float] | None,
    ) -> bool:
        if not (offs[one][index] and offs[other][index]):
            return False
        allowed = ROUGH_AGREEMENT
        if trusted is not None:
            if not {one, other} <= trusted:
                return False
            allowed = AGREEMENT
        first = self._differences[one][index]
        second = self._differences[other][index]
        nearest = min(float((d - self._claimed[index]).norm()) for d in (first, second))
        return float((first - second).norm()) <= allowed * nearest

    def _off_by(self, step: float) -> list[float]:
        """Return the relative difference of each tensor, 0 where it passes."""
        difference = self._differences[step]
        total = max(self._total, _norm(difference))
        eps = torch.finfo(self._values[0].dtype).eps
        allowed = SMALLEST_SHARE * total + ROUNDINGS * eps * self._size / step
        errors = []
        for claimed, measured in zip(self._claimed, difference, strict=True):
            error = float((measured - claimed).norm())
            larger = max(float(claimed.norm()), float(measured.norm()))
            if error <= TOLERANCE * larger + allowed:
                errors.append(0.0)
            else:
                errors.append(error / larger)
        return errors


def _padding(holders: Sequence[nn.Module], parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return (index of the parameter, padding row) for each embedding that has such a row."""
    index = {id(parameter): position for position, parameter in enumerate(parameters)}
    layers = [
        module
        for holder in holders
        for module in holder.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    ]
    return [(index[id(m.weight)], int(m.padding_idx or 0)) for m in layers if id(m.weight) in index]


def _direction(tensors: Sequence[Tensor], padding: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Return a random flat vector that moves each tensor by about the same fraction of its weights.

    The vector is 0 in rows for padding.
    """
    source = torch.Generator().manual_seed(seed)
    typical = _norm(tensors) / sum(p.numel() for p in tensors) ** 0.5 or 1.0
    pieces = []
    for tensor in tensors:
        size = float(tensor.detach().norm()) / max(tensor.numel(), 1) ** 0.5
        noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
        for index, row in padding:
            if tensors[index] is tensor:
                noise[row] = 0
        pieces.append((size or typical) * noise.reshape(-1).to(tensor.device, tensor.dtype))
    return torch.cat(pieces)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())
