"""The start vector of a search, from the results of the last one.

The vector is a sum: the last search's leading vector, its other Ritz vectors, the direction in
which the search would have gone on, and a random part (RANDOM_SHARE in eigenpairs.py). From the
leading vector alone, a search settles with a small residual on what may by now be the second
eigenvalue, 4 to 8 % too low. The sum finds a new leading value whose vector is among the old Ritz
vectors, unless it was far below the leading one: after few products such a vector is still rough
(WARM in evidence.py). A new leading value outside the Ritz vectors grows in the direction from call
to call, as in one longer search: 20 to 100 % above the old one, it is found in the fourth call at
the latest, and 5 % above in the fifth (experiments/benchmarks/warm_start.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hessianflow.curvature.results import EigenResult
from hessianflow.curvature.vectors import normalised

SPARE_VECTORS = 2  # Ritz vectors remembered beyond the k tracked ones; our choice

RUNNER_UP_WEIGHT = 0.5
"""Weight of the other Ritz vectors in a warm start, each times the ratio of its value to the
leading one: a near value may soon lead, while a large part of a far one costs products. Our choice;
experiments/benchmarks/warm_start.py compares it with equal weights."""

DIRECTION_WEIGHT = 0.3
"""Weight of the direction in which the last search would have gone on. Our choice: with it a new
leading value outside the remembered vectors shows after one to three calls, not after ten."""


def by_value(nearness: Tensor) -> Tensor:
    """Return the weights of Ritz vectors, shape [m], from their values relative to the leading."""
    return RUNNER_UP_WEIGHT * nearness


def remembered(result: EigenResult, weigh: Callable[[Tensor], Tensor] = by_value) -> Tensor:
    """Return the start vector [size] that sums up a search by Lanczos.

    `weigh` returns the weights of the Ritz vectors; the leading one always gets 1.
    """
    assert result.direction is not None  # Lanczos returns one
    tiny = torch.finfo(result.direction.dtype).tiny
    # Where negative values lead (which="LA" of a negative matrix), those after them are larger in
    # magnitude: at most 1.
    nearness = (result.values.abs() / result.values[0].abs().clamp_min(tiny)).clamp_max(1)
    weights = weigh(nearness)
    weights[0] = 1
    direction = DIRECTION_WEIGHT * normalised(result.direction)
    return torch.cat([result.vectors * weights, direction[:, None]], dim=1).sum(dim=1).detach()
