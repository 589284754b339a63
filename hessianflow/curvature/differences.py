"""Compares a product with a difference of gradients along one vector, to find faults no graph
shows.

Products come from second derivatives that torch, the model and the loss provide. A function that
keeps intermediates where autograd does not see them, a hook on an activation, or a part that is
detached or computes its own gradients gives a matrix that is symmetric, plausible and wrong. A
small step of the weights reveals it:

    Hessian:               (L(w + s v) - L(w)) / s -> g^T v,  (g(w + s v) - g(w)) / s -> H v
    Gauss-Newton, Fisher:  the same of L, of outputs and the slope of the loss by them, of losses

Choices of ours, so that a healthy model is never refused (experiments/benchmarks/differences.py
counts):

- The weights are copied to float64 and few examples are used. In float32 any step large enough to
  rise above rounding carries thousands of rectified units over their kinks, and the difference
  measures the kinks: on ResNet-20 it is off by a factor of 1 to 30. In float64 a step of 1e-6 or
  1e-8 crosses no kink. A model that does not run in float64 is not checked.
- The comparison is made a thousandth away from the current weights, in a random direction. At the
  start of training biases are 0, and so are the borders of many images: units then sit exactly on
  their kinks, where the derivative is a matter of convention.
- The vector is random, each tensor of weights in its own scale, and several step lengths are tried;
  one that agrees is enough. Embedding rows for padding do not move: torch treats them as constants
  (`padding_idx`), although the loss may depend on them.
- Where no step agrees, the differences must agree among themselves before they count: those of
  continuous quantities over all steps, those of gradients, which jump at kinks, over two steps at
  which the loss moves as its gradient says. A model that rounds internally (16 bits,
  straight-through estimators) does not move at all for a small step, and is not checked.
- Each tensor of the gradient is compared, so that a fault in one layer is not hidden behind a
  larger tensor.

The model's own tensors are left alone: copies stand in for them, and a kept graph stays valid.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors
from hessianflow.curvature.vectors import unflatten

TOLERANCE = 1e-3
"""Largest relative difference at which a tensor passes. Ours: steps that agree differ by at most
1e-5."""

SMALLEST_SHARE = 1e-4
"""Tensors whose share of the whole is below this are skipped: they may be left over by
cancellation."""

AGREEMENT, ROUGH_AGREEMENT = 0.1, 0.5
"""Two steps agree if they differ by at most this share of their distance from the claim. The rough
bound holds where all steps must agree. Ours."""

ROUNDINGS = 100
"""Machine epsilons of a vector that are put down to rounding. Ours."""

EXAMPLES = 4
"""Examples of the batch that are used: faults are in operations, not in examples. Ours."""

SHIFT = 1e-3
"""Distance between the current weights and the point of comparison, relative to the weights.
Ours."""

_STEPS = (1e-6, 1e-8, 1e-4, 1e-3, 1e-2)
"""Step lengths relative to the weights, the likeliest to agree first."""

_LONG = 1e-3
"""The longest step that has to agree: over longer ones a vector may curve."""

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


Vectors = list[Sequence[Tensor]]
"""Vectors, each as tensors that are compared one by one."""


class Linearised(NamedTuple):
    """What a graph claims about derivatives.

    Attributes:
        loss: the mean loss.
        continuous: vectors that depend on the weights without a jump, and only bend at kinks.
        jumping: vectors that jump at kinks: gradients.
        along: the derivatives of both along a flat vector of weights.
        rounds: whether the model rounds to 16 bits, so that differences tell nothing.
    """

    loss: Tensor
    continuous: Vectors
    jumping: Vectors
    along: Callable[[Tensor], tuple[Vectors, Vectors]]
    rounds: bool


class Disagreement(NamedTuple):
    """A derivative that differences contradict.

    Attributes:
        place: the index of the worst tensor; None where there is only one.
        share: its relative error, over the larger of claim and difference.
    """

    place: int | None
    share: float


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

    Args:
        linearise: makes the derivatives that are checked.
        holders: the model and, where it is a module, the loss: their weights and buffers are
            copied.
        parameters: the parameters to differentiate by.
        samples: functions that make batches, tried in turn until one can be made and run: first a
            few examples, then all of them.

    Returns:
        None where the derivatives agree with the differences, or where nothing can be told.
    """
    for sample in samples:
        try:
            given = map_tensors(_wide, sample())
            with _copied(holders, parameters) as copies:
                return _compare(
                    partial(linearise, given, copies), copies, _padding(holders, copies)
                )
        except (
            Exception
        ):  # whatever a model raises in float64, or on a batch, that it was not made for
            continue
    return None


def _compare(
    linearise: Callable[[], Linearised],
    copies: Sequence[Tensor],
    padding: Sequence[tuple[int, int]],
) -> Disagreement | None:
    with torch.no_grad():
        for copy, piece in zip(
            copies, unflatten(_direction(copies, padding, seed=1), copies), strict=True
        ):
            copy.add_(piece, alpha=SHIFT)
    base = [copy.detach().clone() for copy in copies]
    claims = linearise()
    # In a fit to the last digit, rounding decides over every gradient.
    if claims.rounds or not abs(float(claims.loss)) > 1e4 * torch.finfo(torch.float64).eps:
        return None
    direction = _direction(copies, padding, seed=0)
    derivatives = claims.along(direction)
    continuous = [_Vector(*pair) for pair in zip(claims.continuous, derivatives[0], strict=True)]
    jumping = [_Vector(*pair) for pair in zip(claims.jumping, derivatives[1], strict=True)]
    del claims, derivatives  # the graph goes before the weights move
    for step in _STEPS:
        with torch.no_grad():
            for copy, start, piece in zip(copies, base, unflatten(direction, copies), strict=True):
                copy.copy_(start).add_(piece, alpha=step)
        moved = linearise()
        for vector, values in zip(
            (*continuous, *jumping), (*moved.continuous, *moved.jumping), strict=True
        ):
            vector.add(step, values)
        if all(vector.is_confirmed for vector in (*continuous, *jumping)):
            return None
    found = [vector.disagreement() for vector in continuous if not vector.is_confirmed]
    trusted = set(_STEPS).intersection(*(vector.exact_steps() for vector in continuous))
    found += [vector.disagreement(trusted) for vector in jumping if not vector.is_confirmed]
    return max((one for one in found if one is not None), key=lambda one: one.share, default=None)


class _Vector:
    """One vector of values, the derivative claimed for it, and its differences for several
    steps."""

    def __init__(self, values: Sequence[Tensor], claimed: Sequence[Tensor]) -> None:
        self._values = [value.detach().clone() for value in values]
        self._claimed = [tensor.detach() for tensor in claimed]
        self._size = _norm(self._values)
        self._total = _norm(self._claimed)
        self._differences: dict[float, list[Tensor]] = {}
        self.is_confirmed = False

    def add(self, step: float, values: Sequence[Tensor]) -> None:
        """Take the values after a step of this length."""
        difference = [
            (new.detach() - old) / step for new, old in zip(values, self._values, strict=True)
        ]
        self._differences[step] = difference
        self.is_confirmed = self.is_confirmed or not any(self._off_by(step))

    def exact_steps(self) -> set[float]:
        """Return the steps after which the whole vector has moved as claimed, to within
        TOLERANCE."""
        return {
            step
            for step, difference in self._differences.items()
            if _norm([d - c for d, c in zip(difference, self._claimed, strict=True)])
            <= TOLERANCE * self._total
        }

    def disagreement(self, trusted: set[float] | None = None) -> Disagreement | None:
        """Return the worst tensor for which steps agree with each other but not with the claim.

        Args:
            trusted: the steps of which two neighbours must agree; None: all steps up to _LONG must
                agree, and the vector must move at all.
        """
        offs = {step: self._off_by(step) for step in sorted(self._differences)}
        if trusted is None:
            offs = {step: off for step, off in offs.items() if step <= _LONG}
            if min(_norm(self._differences[step]) for step in offs) < TOLERANCE * self._total:
                return None
        worst: dict[int, float] = {}
        for place in range(len(self._claimed)):
            agreeing = [
                (one, other)
                for one, other in pairwise(offs)
                if self._agree(place, one, other, offs, trusted)
            ]
            if agreeing and (trusted is not None or len(agreeing) == len(offs) - 1):
                worst[place] = min(offs[step][place] for step in agreeing[0])
        if not worst:
            return None
        place = max(worst, key=worst.__getitem__)
        return Disagreement(place if len(self._claimed) > 1 else None, worst[place])

    def _agree(
        self,
        place: int,
        one: float,
        other: float,
        offs: dict[float, list[float]],
        trusted: set[float] | None,
    ) -> bool:
        if not (offs[one][place] and offs[other][place]) or (
            trusted is not None and not {one, other} <= trusted
        ):
            return False
        first, second = self._differences[one][place], self._differences[other][place]
        nearest = min(float((d - self._claimed[place]).norm()) for d in (first, second))
        share = ROUGH_AGREEMENT if trusted is None else AGREEMENT
        return float((first - second).norm()) <= share * nearest

    def _off_by(self, step: float) -> list[float]:
        """Return the relative difference of each tensor, 0 where it passes."""
        difference = self._differences[step]
        total = max(self._total, _norm(difference))
        allowed = (
            SMALLEST_SHARE * total
            + ROUNDINGS * torch.finfo(self._values[0].dtype).eps * self._size / step
        )
        found = []
        for claimed, measured in zip(self._claimed, difference, strict=True):
            off = float((measured - claimed).norm())
            larger = max(float(claimed.norm()), float(measured.norm()))
            found.append(0.0 if off <= TOLERANCE * larger + allowed else off / larger)
        return found


def _padding(holders: Sequence[nn.Module], parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the index of the parameter and of its padding row, for each embedding that has one."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    embeddings = [
        module
        for holder in holders
        for module in holder.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    ]
    return [
        (places[id(m.weight)], int(m.padding_idx or 0))
        for m in embeddings
        if id(m.weight) in places
    ]


def _direction(
    parameters: Sequence[Tensor], padding: Sequence[tuple[int, int]], seed: int
) -> Tensor:
    """Return a random flat vector in which each tensor is as long as its weights, so that all move
    by the same share.

    It is 0 in rows for padding.
    """
    source = torch.Generator().manual_seed(seed)
    typical = _norm(parameters) / sum(p.numel() for p in parameters) ** 0.5 or 1.0
    pieces = []
    for parameter in parameters:
        size = float(parameter.detach().norm()) / max(parameter.numel(), 1) ** 0.5
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        for place, row in padding:
            if parameters[place] is parameter:
                noise[row] = 0
        pieces.append((size or typical) * noise.reshape(-1).to(parameter.device, parameter.dtype))
    return torch.cat(pieces)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())


def _wide(tensor: Tensor) -> Tensor:
    wide = _WIDER.get(tensor.dtype)
    return tensor if wide is None else tensor.to(wide)


@contextmanager
def _copied(holders: Sequence[nn.Module], parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let copies stand in for the weights and buffers of some modules; everything is as found
    afterwards.

    Yields:
        The copies of `parameters`.
    """
    modules = list(dict.fromkeys(module for holder in holders for module in holder.modules()))
    found = [
        (module, dict(module._parameters), dict(module._buffers), _held(module))
        for module in modules
    ]
    copies = {id(parameter): _copy(parameter) for parameter in parameters}
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = copies.setdefault(id(parameter), _shared(parameter))  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), _copy(buffer))
        yield [copies[id(parameter)] for parameter in parameters]
    finally:
        for module, parameters_found, buffers, held in found:
            for name, tensor in parameters_found.items():
                module._parameters[name] = tensor
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
            module.__dict__.update(held)


def _held(module: nn.Module) -> dict[str, Any]:
    """Return plain tensors, and the lists of weights that recurrent layers keep: a forward pass may
    replace them."""
    return {key: value for key, value in vars(module).items() if isinstance(value, (Tensor, list))}


def _shared(parameter: Tensor) -> Tensor:
    """Return a tensor that the measurement holds constant: the parameter itself unless it must be
    widened."""
    return parameter if parameter.dtype not in _WIDER else _copy(parameter)


def _copy(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"a {type(tensor).__name__} cannot be copied into another type")
    wide = _WIDER.get(tensor.dtype)
    made = tensor.detach().clone() if wide is None else tensor.detach().to(wide)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
