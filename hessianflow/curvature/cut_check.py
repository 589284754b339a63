"""A check that each row of a model's outputs depends on its example alone, so a batch may be cut.

A tensor that all examples share, such as a table of positions, may happen to have as many rows as
the batch has examples; it is then mistaken for one row per example and cut with the others. A layer
of the user's own may compare rows or normalise by them. In either case the matrix would depend on
where the batch is cut. The first examples of the first batch that is cut are therefore run twice,
three of them and then two: the rows that both runs return must be the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples, take_rows
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.measuring import measuring
from hessianflow.structure import tensors_in

ROWS = 3
"""Examples of the longer run; the shorter one has one less. Our choice: two at least, because a
model may treat a single example as a special case."""

TOLERANCE = 1e-2
"""Relative difference of outputs that passes. Our choice: kernels for different numbers of rows
differ by rounding, at most 1e-6 in float32; rows that depend on others differ by tenths."""

ROUNDINGS = 30  # machine epsilons that pass where they are more than TOLERANCE, as in bfloat16

WAY_OUT = (
    "keep the batch in one pass; or, if a tensor is shared by all examples, give it a first"
    " dimension of 1 (t[None]); or pass a list of batches as they are to be run"
)


def check_cut(model: nn.Module, batch: Batch, local: Callable[[Any], Any]) -> None:
    """Refuse to cut a batch (inputs, targets) whose examples change each other's outputs.

    A random model, and one whose outputs have no row for each example, pass unchecked. `local`
    moves some examples to the device of the model.

    Raises:
        HessianFlowError: the rows differ; or the model cannot run fewer examples, and more than one
            tensor would be cut.
    """
    inputs = batch[0]
    total = num_examples(batch)
    rows = min(ROWS, total)
    may_be_shared = sum(t.ndim > 0 and len(t) == total for t in tensors_in(inputs)) > 1
    more = local(take_rows(inputs, slice(0, rows), total, "inputs"))
    fewer = local(take_rows(inputs, slice(0, rows - 1), total, "inputs"))
    with measuring(model):
        try:
            longer = _outputs(model, more)
            shorter = _outputs(model, fewer)
            differ = _differ(longer, shorter, rows)
            is_random = differ and not all(map(torch.equal, shorter, _outputs(model, fewer)))
        except Exception as error:  # whatever a model raises for a batch that it was not made for
            if not may_be_shared:
                return
            raise HessianFlowError(
                f"the model cannot be run on {rows} of {total} examples ({type(error).__name__}):"
                f" {WAY_OUT}"
            ) from error
    if differ and not is_random:
        raise HessianFlowError(
            f"the model's output for an example depends on the others in the batch: runs on {rows}"
            f" and on {rows - 1} of {total} examples give different rows, so the batch cannot be"
            f" cut; {WAY_OUT}"
        )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    # With gradients enabled, as in a product: a model may itself differentiate.
    return [t.detach() for t in tensors_in(model(inputs))]


def _differ(longer: list[Tensor], shorter: list[Tensor], rows: int) -> bool:
    """Return whether the rows that two runs share differ; outputs without rows are skipped."""
    pairs = [
        (one, other)
        for one, other in zip(longer, shorter, strict=False)
        if one.ndim == other.ndim > 0 and (len(one), len(other)) == (rows, rows - 1)
    ]
    return any(_differs(one[: rows - 1], other, rows) for one, other in pairs)


def _differs(one: Tensor, other: Tensor, rows: int) -> bool:
    sizes = list(zip(one.shape[1:], other.shape[1:], strict=True))
    if (rows, rows - 1) in sizes:  # each example is compared with all
        return True
    # Outputs may be padded to their longest example: only the positions that both have count.
    for dimension, pair in enumerate(sizes, start=1):
        one, other = (t.narrow(dimension, 0, min(pair)) for t in (one, other))
    if not (one.is_floating_point() or one.is_complex()):
        return False
    difference = (one - other).abs()
    difference = difference[torch.isfinite(difference)].double().norm()
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(one.dtype).eps)
    # The host waits for the device here, once for each operator.
    return bool(difference > allowed * other[torch.isfinite(other)].abs().double().norm())
