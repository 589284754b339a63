"""Check that a loss may be cut into parts: the weighted mean over them must be the loss of the whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors, num_examples, take_rows
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses.mean import EXAMPLES, STATED, Averaged, MeanLoss, WeightedLoss
from hessianflow.losses.weights import mixes_rows
from hessianflow.measuring import measuring

NO_ROWS = "the outputs have no row for each example, so nothing shows what the mean loss divides by"
WAY_OUT = (
    "wrap it in hf.WeightedLoss(loss_fn, weight), which says what the mean divides by, or keep every batch in one pass"
)


class SplitCheck:
    """Compares a loss over some rows with the weighted mean over two parts of them.

    Stated weights are not checked, nor are losses of torch, but for outputs and targets whose rows
    they mix. The first part of a batch is, then the second,
    fourth, eighth and so on: rows that all count show nothing.

    Args:
        loss: what is called.
    """

    def __init__(self, loss: MeanLoss) -> None:
        self._loss = loss
        self._is_needless = loss.is_known or isinstance(loss.loss_fn, WeightedLoss)
        self._parts = 0
        self._next = 1
        self._waiting: tuple[Any, Any] | None = None

    def __call__(self, outputs: Any, targets: Any) -> None:
        """Check, if it is time, with what one part of a larger batch gave.

        Args:
            outputs: of the model; for a loss that is called as loss_fn(model, batch), the model.
            targets: or the batch. A single row waits for the next one.

        Raises:
            HessianFlowError: the two differ, or the outputs have no row for each example, so that
                nothing can be compared.
        """
        if self._loss.is_known and mixes_rows(self._loss.loss_fn, outputs, targets):
            shapes = f"outputs of shape {list(outputs.shape)} and targets of shape {list(targets.shape)}"
            raise HessianFlowError(
                f"the loss compares every row with every other: {shapes} are broadcast, so its parts do not add up "
                "to it; give both one shape, such as outputs.squeeze(1)"
            )
        if self._is_needless:
            return
        self._parts += 1
        if self._parts < self._next:
            return
        pair = self._of_two_rows(outputs, targets)
        if pair is None:
            return
        self._next = 2 * self._parts
        with untouched(self._loss.loss_fn):
            self._compare(*pair)

    def _of_two_rows(self, outputs: Any, targets: Any) -> tuple[Any, Any] | None:
        if num_examples(targets) > 1:
            return outputs, targets
        if self._waiting is None:
            self._waiting = map_tensors(Tensor.detach, outputs), targets
            return None
        before, targets_before = self._waiting
        self._waiting = None
        return _joined(before, outputs), _joined(targets_before, targets)

    def _compare(self, outputs: Any, targets: Any) -> None:
        rows = num_examples(targets)
        whole = self._loss(outputs, targets)
        if whole.source == STATED:
            self._is_needless = True
            return
        cut = rows // 3 or 1  # unequal parts: equal ones hide a weight that ought to differ
        spans = (slice(0, cut), slice(cut, rows))
        pairs = [_cut(outputs, targets, span, rows) for span in spans]
        if None in pairs:
            if whole.source == EXAMPLES:
                raise HessianFlowError(f"{NO_ROWS}: {WAY_OUT}")
            return
        parts = [self._loss(*pair) for pair in pairs if pair is not None]
        # The host waits for the device here, a few times a run.
        value = float(whole.value.detach())
        found, scale = _mean(parts)
        tolerance = _tolerance(whole.value.dtype) * max(scale, abs(value))
        if not abs(found - value) > tolerance:  # a nan: nothing counts, or the loss has diverged
            return
        again = float(self._loss(outputs, targets).value.detach())
        if abs(again - value) > tolerance:
            return  # the loss is random, and differs from itself: nothing can be told
        raise HessianFlowError(
            f"the loss of {rows} examples is {value:.6g}, but {found:.6g} as the mean over parts of {cut} and "
            f"{rows - cut} of them, weighted by {whole.source}: {WAY_OUT}"
        )


def _mean(parts: list[Averaged]) -> tuple[float, float]:
    """Return the weighted mean, and the largest magnitude among the parts."""
    total = 0.0
    weights = 0.0
    scale = 0.0
    for part in parts:
        weight = float(part.weight)
        if weight > 0:
            total += weight * float(part.value.detach())
            weights += weight
            scale = max(scale, abs(float(part.value.detach())))
    return (total / weights if weights else math.nan), scale


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that rounding explains: a thousand roundings of a sum.

    In 16 bits so many would be larger than the value; there it is four.
    """
    eps = torch.finfo(dtype).eps
    return max(4 * eps, min(1e-4, 1024 * eps))


def _cut(outputs: Any, targets: Any, span: slice, rows: int) -> tuple[Any, Any] | None:
    """Return some rows of outputs and targets, a model as it is; None where the outputs have no rows."""
    if not isinstance(outputs, nn.Module):
        if not any(t.ndim > 0 and len(t) == rows for t in _tensors(outputs)):
            return None
        try:
            outputs = take_rows(outputs, span, rows, "outputs")
        except HessianFlowError:
            return None
    return outputs, take_rows(targets, span, rows, "targets")


def _joined(first: Any, second: Any) -> Any:
    """Return two structures of one row as one of two rows; what has no row, such as a model, stays as it is."""
    ahead = iter(_tensors(first))

    def join(tensor: Tensor) -> Tensor:
        before = next(ahead)
        return torch.cat([before, tensor]) if tensor.ndim > 0 and len(tensor) == 1 else tensor

    return map_tensors(join, second)


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, batch)  # type: ignore[func-returns-value]
    return found


@contextmanager
def untouched(loss_fn: Any) -> Iterator[None]:
    """Leave the random generators, and the buffers of a loss that is a module, as they were found."""
    module = loss_fn if isinstance(loss_fn, nn.Module) else nn.Module()
    modes = [(part, part.training) for part in module.modules()]
    with measuring(module):
        for part, training in modes:
            part.training = training
        yield
