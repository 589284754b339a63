"""The choice of the rows of an optimization batch that are perturbed.

These are floor(B * share) rows, spread evenly: row i is chosen iff floor((i + 1) * share) >
floor(i * share). The choice is made on the optimization batch, so it does not depend on how the
batch is split into microbatches, and every split keeps the mix to within one example. ABSA's
reference implementation perturbs the first rows of each microbatch instead. As examples are
shuffled, only the choice differs.
"""

from fractions import Fraction

import torch
from torch import Tensor

from hessianflow.checks import is_number
from hessianflow.interfaces import HessianFlowError

# Shares are read as the nearest fraction with at most this denominator: 0.29 * 100 is
# 28.999999999999996 in floating point, and its floor would lose a row.
_MAX_DENOMINATOR = 10**6

ABSA_SHARE = 0.2
"""Share of each batch that ABSA's reference implementation attacks at the start."""


def check_share(share: float) -> float:
    """Return the share of each batch that an adversary is to attack, if it is in [0, 1]."""
    if not is_number(share) or not 0 <= share <= 1:
        raise HessianFlowError(f"share must be a number in [0, 1], got {share!r}")
    return share


def perturbed_rows(batch_size: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """Return the rows to perturb, ascending, shape [floor(batch_size * share)], int64.

    They are computed on `device` without waiting for it.

    Raises:
        HessianFlowError: The share is outside [0, 1].

    Example:
        >>> perturbed_rows(10, 0.3)
        tensor([3, 6, 9])
    """
    part = exact_share(share)
    count = batch_size * part.numerator // part.denominator
    # Row i is the k-th chosen one iff it is the smallest with (i + 1) * share >= k, which is
    # i = ceil(k / share) - 1.
    k = torch.arange(1, count + 1, device=device)
    return (k * part.denominator + part.numerator - 1) // max(part.numerator, 1) - 1


def exact_share(share: float) -> Fraction:
    """Return the share as the fraction that is meant: 0.2 / 2**k is exactly 1 / (5 * 2**k)."""
    if not 0 <= share <= 1:
        raise HessianFlowError(f"adversarial share must lie in [0, 1], got {share}")
    return Fraction(share).limit_denominator(_MAX_DENOMINATOR)
