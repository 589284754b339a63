"""A check that a loss may be cut into parts, whose weighted mean must equal the whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors, num_examples, take_rows
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses.mean import EXAMPLES, STATED, Averaged, MeanLoss, WeightedLoss
from hessianflow.losses.model_loss import ModelLoss
from hessianflow.losses.weights import mixes_rows
from hessianflow.measuring import measuring, unwrap
from hessianflow.structure import entries, is_list, rebuilt, tensors_in

NO_ROWS = "the outputs have no row for each example, so nothing shows what the mean loss divides by"
ALIKE = 0.1
"""Parts whose losses differ by less than this fraction hardly show their weights. Gradients by the
outputs are then compared, too. Our choice."""

SLOPE_TOLERANCE = 1e-2
"""Relative difference of these gradients that passes. Our choice: a wrong weight moves them by
tenths."""

WAY_OUT = (
    "wrap it in hf.WeightedLoss(loss_fn, weight), which says what the mean divides by, or keep"
    " every batch in one pass"
)


class SplitCheck:
    """Compares a loss over some rows with the weighted mean over two parts of them.

    Stated weights are not checked. Losses of torch are checked only for outputs and targets whose
    rows they would mix. For any other loss the first part of a batch is checked, then the second,
    fourth, eighth and so on, because parts in which every row counts show nothing. Each time some
    rows are kept and compared together with rows of the next part: a part whose rows are all alike
    shows nothing either, as where it is padding or where data are sorted by class.
    """

    def __init__(self, loss: MeanLoss) -> None:
        self._loss = loss
        is_stated = isinstance(loss.loss_fn, WeightedLoss)
        if isinstance(loss.loss_fn, ModelLoss):
            is_stated = loss.loss_fn.weight is not None
        self._is_needless = loss.is_known or is_stated
        self._parts = 0
        self._next = 1
        self._kept: tuple[Any, Any] | None = None

    def __call__(self, outputs: Any, targets: Any) -> None:
        """Check the loss on one part of a larger batch, if a check is due.

        The arguments are those of :class:`MeanLoss`. A single row is compared only with the next
        one.

        Raises:
            HessianFlowError: the loss is not the weighted mean, or the outputs have no row for each
                example, so that nothing can be compared.
        """
        if self._loss.is_known and mixes_rows(self._loss.loss_fn, outputs, targets):
            shapes = (
                f"outputs of shape {list(outputs.shape)} and targets of shape {list(targets.shape)}"
            )
            raise HessianFlowError(
                f"the loss compares every row with every other: {shapes} are broadcast, so its"
                " parts do not add up to it; give both one shape, such as outputs.squeeze(1)"
            )
        if self._is_needless:
            return
        self._parts += 1
        is_time = self._parts >= self._next
        if self._kept is None and not is_time:
            return
        outputs = map_tensors(Tensor.detach, outputs)
        with untouched(self._loss.loss_fn), _repeatable(outputs):
            if isinstance(outputs, nn.Module):
                outputs = unwrap(outputs)
            if self._kept is not None:
                self._compare_kept(*self._kept, outputs, targets)
                self._kept = None
            if is_time:
                self._next = 2 * self._parts
                self._check(outputs, targets)

    def _check(self, outputs: Any, targets: Any) -> None:
        rows = num_examples(targets)
        cut = rows // 3 or 1  # parts of equal size would hide a weight that ought to differ
        whole = self._averaged(outputs, targets)
        first = _rows(outputs, targets, slice(0, cut), rows)
        if first is None:
            if whole.source == EXAMPLES:
                raise HessianFlowError(f"{NO_ROWS}: {WAY_OUT}")
            return
        if rows > 1:
            self._compare(whole, outputs, targets, cut)
            # A stated weight needs one check, that (sum, count) holds a sum and not a mean.
            if whole.source == STATED:
                self._is_needless = True
                return
        # Copies, because views of a few rows would keep all rows in memory.
        self._kept = map_tensors(Tensor.clone, first[0]), map_tensors(Tensor.clone, first[1])

    def _compare_kept(self, before: Any, targets_before: Any, outputs: Any, targets: Any) -> None:
        kept = num_examples(targets_before)
        rows = num_examples(targets)
        taken = max(1, rows - kept)  # both together are no larger than one part, to save memory
        later = _rows(outputs, targets, slice(0, taken), rows)
        if later is None:
            return
        try:
            joined = _joined(before, later[0], kept, taken)
            pair = joined, _joined(targets_before, later[1], kept, taken)
            whole = self._averaged(*pair)
        # Parts may have different lengths, and a loss may ask anything of rows that it takes
        # together.
        except Exception:
            return
        self._compare(whole, *pair, kept)

    def _compare(self, whole: Averaged, outputs: Any, targets: Any, cut: int) -> None:
        rows = num_examples(targets)
        spans = (slice(0, cut), slice(cut, rows))
        parts = []
        for span in spans:
            pair = _rows(outputs, targets, span, rows)
            if pair is None:
                return
            try:
                parts.append(self._averaged(*pair))
            # A loss may raise anything for fewer rows than it was made for.
            except Exception as error:
                raise HessianFlowError(
                    f"the loss cannot be computed for {span.stop - span.start} of {rows} examples"
                    f" ({type(error).__name__}), so nothing shows what its mean divides by:"
                    f" {WAY_OUT}"
                ) from error
        # The host waits for the device here, a few times a run.
        counting = [part for part in parts if float(part.weight) > 0]
        if not counting:
            return
        value = float(whole.value.detach())
        mean, scale = _mean(counting)
        dtype = whole.value.dtype
        tolerance = _tolerance(dtype, outputs) * max(scale, abs(value), torch.finfo(dtype).tiny)
        # A whole that is not finite shows divergence, not weights. A single part that is not finite
        # fails below.
        if not math.isfinite(value):
            return
        if abs(mean - value) <= tolerance:
            spread = max(abs(float(part.value.detach()) - value) for part in counting)
            if spread < ALIKE * abs(value):
                self._compare_slopes(outputs, targets, spans)
            return
        again = float(self._averaged(outputs, targets).value.detach())
        if not abs(again - value) <= tolerance:
            return  # a random loss differs from itself: the comparison shows nothing
        raise HessianFlowError(
            f"the loss of {rows} examples is {value:.6g}, but {mean:.6g} as the mean over parts of"
            f" {cut} and {rows - cut} of them, weighted by {whole.source}: {WAY_OUT}"
        )

    def _averaged(self, outputs: Any, targets: Any) -> Averaged:
        """Return the loss; one that runs the model gets no graph, which could exceed the memory."""
        if not isinstance(outputs, nn.Module):
            return self._loss(outputs, targets)
        try:
            with torch.no_grad():
                return self._loss(outputs, targets)
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
        averaged = self._loss(outputs, targets)  # this loss itself differentiates
        return replace(averaged, value=averaged.value.detach(), outputs=None)

    def _compare_slopes(self, outputs: Any, targets: Any, spans: tuple[slice, slice]) -> None:
        """Compare the gradients by the outputs.

        Parts with equal losses, as at the start of training, give the same mean under any weights.
        """
        rows = num_examples(targets)
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.detach().requires_grad_()
                leaves.append(tensor)
            return tensor

        outputs = map_tensors(leaf, outputs)
        whole = self._loss(outputs, targets)
        pairs = [_rows(outputs, targets, span, rows) for span in spans]
        parts = [self._loss(*pair) for pair in pairs if pair is not None]
        if not leaves or not whole.value.requires_grad:
            return
        counting = [(part.value, float(part.weight)) for part in parts if float(part.weight) > 0]
        total = sum(weight for _, weight in counting)
        mean = sum(value * (weight / total) for value, weight in counting)
        ours, theirs = (_slopes(value, leaves) for value in (mean, whole.value))
        limits = torch.finfo(whole.value.dtype)
        allowed = max(SLOPE_TOLERANCE, 4 * limits.eps) * max(float(theirs.norm()), limits.tiny)
        if float((ours - theirs).norm()) > allowed:
            raise HessianFlowError(
                f"the loss of {rows} examples has another gradient than the mean over two parts of"
                f" them, weighted by {whole.source}: {WAY_OUT}"
            )


def _slopes(value: Any, leaves: list[Tensor]) -> Tensor:
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.reshape(-1).double() for slope in slopes])


def _mean(parts: list[Averaged]) -> tuple[float, float]:
    """Return the weighted mean, and the largest magnitude among the parts."""
    weights = [float(part.weight) for part in parts]
    values = [float(part.value.detach()) for part in parts]
    total = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return total / sum(weights), max(0.0, *map(abs, values))


def _tolerance(dtype: torch.dtype, outputs: Any) -> float:
    """Return the relative difference that rounding explains: a thousand roundings of a sum.

    In 16 bits a thousand roundings would exceed the value itself; four are allowed there. A model
    in place of the outputs rounds as its weights do.
    """
    eps = torch.finfo(dtype).eps
    if isinstance(outputs, nn.Module):
        of_weights = (p.dtype for p in outputs.parameters() if p.is_floating_point())
        eps = max(eps, *(torch.finfo(one).eps for one in of_weights))
    return max(4 * eps, min(1e-4, 1024 * eps))


def _rows(outputs: Any, targets: Any, span: slice, rows: int) -> tuple[Any, Any] | None:
    """Return some rows of outputs (or the model instead of them) and targets; None without rows."""
    if not isinstance(outputs, nn.Module):
        if not any(t.ndim > 0 and len(t) == rows for t in tensors_in(outputs)):
            return None
        try:
            outputs = _rows_of(outputs, span, rows, "outputs")
        except HessianFlowError:
            return None
    return outputs, _rows_of(targets, span, rows, "targets")


def _rows_of(part: Any, span: slice, rows: int, name: str) -> Any:
    # A list of two tensors of two rows may be two examples or two inputs. In a batch that was cut
    # it is two inputs.
    if is_list(part) and all(isinstance(t, Tensor) and t.ndim > 0 and len(t) == rows for t in part):
        return type(part)(t[span] for t in part)
    return take_rows(part, span, rows, name)


def _joined(first: Any, second: Any, rows: int, others: int) -> Any:
    """Return two structures joined into one of `rows` + `others` rows; ValueError: they differ.

    Entries without rows, such as a model, are returned unchanged.
    """
    is_array = isinstance(first, (Tensor, np.ndarray))
    if is_array and first.ndim > 0 and (len(first), len(second)) == (rows, others):
        if isinstance(first, Tensor):
            return torch.cat([first, second])
        return np.concatenate([first, second])
    ahead = entries(first)
    behind = entries(second)
    if ahead is None or behind is None:
        return second
    has_entries = is_list(first) and len(first) == rows
    if has_entries and not all(isinstance(part, Tensor) for part in first):
        raise ValueError("one entry may be one example")
    parts = [_joined(one, other, rows, others) for one, other in zip(ahead, behind, strict=True)]
    return rebuilt(second, parts)


@contextmanager
def _repeatable(outputs: Any) -> Iterator[None]:
    """Let a model in place of the outputs run without noise, without autocast and without a trace.

    Its results can then be compared with each other, and running it changes no state.
    """
    if not isinstance(outputs, nn.Module):
        yield
        return
    device = next(outputs.parameters()).device.type
    with measuring(outputs), torch.autocast(device, enabled=False):
        yield


@contextmanager
def untouched(loss_fn: Any) -> Iterator[None]:
    """Restore the random generators, and the buffers of a loss that is a module, afterwards."""
    module = nn.Module()
    if isinstance(loss_fn, nn.Module):
        module = loss_fn
    modes = [(part, part.training) for part in module.modules()]
    with measuring(module):
        for part, training in modes:
            part.training = training
        yield
