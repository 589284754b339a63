"""Rules by which the learning rate follows the batch size.

For a batch k times larger,

- "linear" multiplies the rate by k (Goyal et al., arXiv:1706.02677, section 2.1);
- "sqrt" multiplies it by sqrt(k) (Krizhevsky, arXiv:1404.5997), as usual with adaptive optimizers;
- "none" leaves it as it is.
"""

import math
from typing import Literal, get_args

from hessianflow.checks import check_choice, check_count, check_number

LRRule = Literal["linear", "sqrt", "none"]


def lr_factor(
    batch_size: int,
    reference_batch_size: int,
    rule: LRRule = "linear",
    *,
    max_factor: float | None = None,
) -> float:
    """Return the factor of a learning rate that is stated for `reference_batch_size`.

    Args:
        batch_size: Examples per step.
        reference_batch_size: Examples per step at which the factor is 1.
        rule: Rule by which the rate follows, see the module.
        max_factor: Cap on the factor; None stands for no cap.

    Raises:
        HessianFlowError: A size is below 1, the rule is unknown, or the cap is not positive.
    """
    check_count("batch_size", batch_size)
    check_count("reference_batch_size", reference_batch_size)
    check_choice("lr_rule", rule, get_args(LRRule))
    scale = batch_size / reference_batch_size
    factor = {"linear": scale, "sqrt": math.sqrt(scale), "none": 1.0}[rule]
    if max_factor is None:
        return factor
    return min(factor, check_number("max_factor", max_factor, above=0))
