"""Limits on the share of a spectrum that lies below a value, from a quadrature.

References: Golub, Some modified matrix eigenvalue problems, 1973 (a node at a chosen value);
Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6 (its weights bound the
measure).

The m nodes and weights of Lanczos quadrature fix 2m moments of the spectral measure of the start
vector, and many measures share those moments. For all of them, the rule with one more node at x
bounds the mass below x: it is at least the sum of the weights below x, and at most that sum plus
the weight at x. The weight at x is what the quadrature cannot decide. Where one eigenvalue, such as
0, makes up half of the spectrum, that weight is a half or more; counting nodes instead would put
all of it on the side to which rounding moved a node.

Our choices: for the mass below a value, x is moved outwards on either side by the rounding of
products; for shares by sign, an eigenvalue within that rounding of 0 counts as zero, because
products cannot tell it from 0. The squared part of a random unit vector of n rows in s n of n
eigenvectors has variance 2 s (1 - s) / (n + 2) (the beta distribution). The error of a share is
therefore known, not estimated from a few probes; the limits are Wilson's for that variance, at two
standard errors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = 1e-6
"""Least share that counts as an eigenvalue, in multiples of the mean squared part of a random start
in one eigenvector. A start has less than this in an eigenvector once in a thousand."""

NEAREST = 1e-8
"""Least distance, relative to the largest magnitude, between the added node and the others: a
smaller one would lead to numbers too large for an accurate rule."""

DEVIATIONS = 2.0  # standard errors on either side: 95 % where shares are roughly normal


@dataclass(frozen=True)
class Share:
    """A share of the eigenvalues, with 95 % limits.

    Attributes:
        value: the share by quadrature, averaged over probes.
        low: lower limit of the true share.
        high: upper limit of the true share.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SignShares:
    """The shares of negative, zero and positive eigenvalues, whose values sum to 1.

    Attributes:
        negative: eigenvalues that are surely below 0. The limits are those of all eigenvalues
            below 0 by more than the rounding of products.
        zero: eigenvalues that cannot be told from 0, because of rounding or because the quadrature
            has too few steps. The limits are those of the eigenvalues that are 0 up to rounding.
        positive: eigenvalues that are surely above 0, with limits as for negative.
        zone: the first nodes on either side that are not 0, averaged over probes, or the rounding
            of products where there is none. Values between them cannot be told apart.
    """

    negative: Share
    zero: Share
    positive: Share
    zone: tuple[float, float]


def mass_limits(recurrence: Tensor, first: float, last: float) -> tuple[float, float]:
    """Return the least spectral measure of one start below `first`, and the most up to `last`.

    `recurrence` holds the diagonal and off-diagonal of the tridiagonal matrix of Lanczos, [2,
    steps]. The last off-diagonal entry leads out of it; it is 0 after a breakdown.
    """
    _, weights, index = with_node(recurrence, first, -1)
    least = float(weights[:index].sum())
    _, weights, index = with_node(recurrence, last, 1)
    is_put = bool(recurrence[1, -1] > 0)
    return least, min(1.0, float(weights[: index + is_put].sum()))


def with_node(recurrence: Tensor, value: float, side: int) -> tuple[Tensor, Tensor, int]:
    """Return nodes and weights of the rule with one more node at a value, and that node's index.

    If there is a node already, the value is moved a little: down for `side` -1, up for 1. After a
    breakdown all nodes are eigenvalues, and no node is added: the index is where it would be.
    """
    diagonal, beside = recurrence
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[:-1]))
    leads_out = float(beside[-1])
    if leads_out == 0:
        below = nodes <= value
        if side < 0:
            below = nodes < value
        return nodes, vectors[0] ** 2, int(below.sum())
    scale = max(float(nodes.abs().max()), abs(value))
    while float((nodes - value).abs().min()) < NEAREST * scale:
        value += side * NEAREST * scale
    # With this last diagonal entry the matrix of one more step has the value as an eigenvalue.
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


def _wilson(share: float, size: int, probes: int) -> tuple[float, float]:
    if share * size <= NONE:
        return 0.0, 0.0
    if (1 - share) * size <= NONE:
        return 1.0, 1.0
    count = probes * (size + 2) / 2
    square = DEVIATIONS**2
    middle = share + square / (2 * count)
    half = (square * (share * (1 - share) / count + square / (4 * count**2))) ** 0.5
    low = (middle - half) / (1 + square / count)
    high = (middle + half) / (1 + square / count)
    return max(0.0, low), min(1.0, high)
