"""How much of a spectrum lies below a value, between limits that a quadrature does not decide.

References: Golub, Some modified matrix eigenvalue problems, 1973 (a node put where one wants it);
Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6 (its weights bound the
measure).

The m nodes and weights of Lanczos quadrature fix 2m moments of the spectral measure of the start
vector, and many measures share those moments. For all of them, the rule with one more node at x
bounds the mass below x: it is at least the sum of the weights below x, and at most that sum plus
the weight at x. The weight at x is what the quadrature cannot decide. Where one eigenvalue, such as
0, holds half of the spectrum, that weight is a half or more; counting nodes instead would put all
of it on the side to which rounding moved a node.

Choices of ours: for the mass below a value, x is moved outwards on either side by the rounding of
products; for shares by sign, an eigenvalue within that rounding of 0 counts as zero, because
products cannot tell it from 0. The squared part of a random unit vector of n rows in s n of n
eigenvectors has variance 2 s (1 - s) / (n + 2) (the beta distribution). Its error is therefore
known, not estimated from a few probes; the limits are Wilson's for that variance, at two standard
errors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = 1e-6
"""Multiples of the mean squared part of a random start in one eigenvector. A start has less than
this once in a thousand, so a smaller share is taken for no eigenvalue at all."""

NEAREST = 1e-8
"""Least distance, relative to the largest magnitude, between the added node and the others: a
smaller one would give numbers too large for an accurate rule."""

DEVIATIONS = 2.0
"""Standard errors on either side: 95 % where parts are roughly normal."""


@dataclass(frozen=True)
class Share:
    """A share of the eigenvalues.

    Attributes:
        value: the share by quadrature, averaged over probes.
        low: the true share is at least this (95 %).
        high: the true share is at most this (95 %).
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SignShares:
    """Negative, zero and positive eigenvalues; the three values sum to 1.

    Attributes:
        negative: surely below 0. The limits are on all that are, by more than the rounding of
            products.
        zero: what cannot be told from 0, because of rounding or of too few steps of the quadrature.
            The limits are on what is 0 up to rounding.
        positive: surely above 0, with limits as for negative.
        zone: the first nodes on either side that are not 0, averaged over probes, or the rounding
            of products where there is none. Values between them cannot be told apart.
    """

    negative: Share
    zero: Share
    positive: Share
    zone: tuple[float, float]


def mass_limits(recurrence: Tensor, first: float, last: float) -> tuple[float, float]:
    """Return the least spectral measure of one start below `first`, and the most up to `last`.

    Args:
        recurrence: diagonal and off-diagonal of the tridiagonal matrix of Lanczos, shape [2,
            steps]; the last off-diagonal leads out of it, 0 where the search broke down.
        first: a value.
        last: the same value, or a larger one.
    """
    _, weights, place = with_node(recurrence, first, -1)
    least = float(weights[:place].sum())
    _, weights, place = with_node(recurrence, last, 1)
    is_put = bool(recurrence[1, -1] > 0)
    return least, min(1.0, float(weights[: place + is_put].sum()))


def with_node(recurrence: Tensor, value: float, side: int) -> tuple[Tensor, Tensor, int]:
    """Return the nodes and weights of the rule with a node at a given value, and the place of that
    node.

    After a breakdown all nodes are eigenvalues, and none is put: the place is where it would be.

    Args:
        recurrence: see :func:`mass_limits`.
        value: where to put it; moved a little if a node is there already.
        side: to move it down (-1) or up (1).
    """
    diagonal, beside = recurrence
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[:-1]))
    leads_out = float(beside[-1])
    if leads_out == 0:
        above = nodes >= value if side < 0 else nodes > value
        return nodes, vectors[0] ** 2, len(nodes) - int(above.sum())
    scale = max(float(nodes.abs().max()), abs(value))
    while float((nodes - value).abs().min()) < NEAREST * scale:
        value += side * NEAREST * scale
    # The last entry that makes the value an eigenvalue of the matrix of one more step.
    last = value + leads_out**2 * float((vectors[-1] ** 2 / (nodes - value)).sum())
    grown = tridiagonal(torch.cat([diagonal, diagonal.new_tensor([last])]), beside)
    nodes, vectors = torch.linalg.eigh(grown)
    return nodes, vectors[0] ** 2, int((nodes - value).abs().argmin())


def tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Return the symmetric matrix [m, m] of a diagonal [m] and an off-diagonal [m - 1]."""
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def limits_of(least: float, most: float, size: int, probes: int) -> tuple[float, float]:
    """Return limits on a share, from the mean bounds `least` and `most` over random starts."""
    return _wilson(least, size, probes)[0], _wilson(most, size, probes)[1]


def _wilson(part: float, size: int, probes: int) -> tuple[float, float]:
    if part * size <= NONE:
        return 0.0, 0.0
    if (1 - part) * size <= NONE:
        return 1.0, 1.0
    count = probes * (size + 2) / 2
    square = DEVIATIONS**2
    middle = part + square / (2 * count)
    half = (square * (part * (1 - part) / count + square / (4 * count**2))) ** 0.5
    low, high = ((middle + sign * half) / (1 + square / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
