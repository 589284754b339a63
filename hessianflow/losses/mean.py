"""The mean loss over one batch and its divisor, whatever the loss function returns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples
from hessianflow.interfaces import HessianFlowError, LossFn
from hessianflow.losses.model_loss import ModelLoss, returned
from hessianflow.losses.observer import COUNT, Observer
from hessianflow.losses.weights import (
    Weight,
    as_weight,
    counts_classes,
    is_torchs,
    known_weight,
    setting,
    weighted,
)
from hessianflow.structure import described

EXAMPLES = "examples"
STATED = "the count it states"


class WeightedLoss(nn.Module):
    """A loss together with the divisor of its mean.

    Use it for a loss that is not one of torch's own and does not divide by the number of examples.
    A stated weight is not checked.

    Args:
        loss_fn: loss_fn(outputs, targets), a mean; for a dict batch, or in a
            :class:`ModelLoss`, loss_fn(model, batch).
        weight: returns the divisor of that mean, for the same two arguments: a number or a scalar
            tensor, at least 0. Where it is 0 the loss does not count, whatever its value.

    Example:
        >>> import torch
        >>> def error(outputs, targets):
        ...     return (outputs - targets)[targets >= 0].abs().mean()
        >>> loss_fn = WeightedLoss(error, lambda outputs, targets: (targets >= 0).sum())
        >>> loss_fn(torch.zeros(3), torch.tensor([1.0, 2.0, -1.0]))
        (tensor(3.), tensor(2))
    """

    def __init__(self, loss_fn: LossFn, weight: Callable[[Any, Any], Weight]) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.weight = weight

    def forward(self, outputs: Any, targets: Any) -> tuple[Tensor, Weight]:
        """Return (sum, count): the mean times its weight, and the weight."""
        mean = mean_loss(self.loss_fn, outputs, targets)
        weight = self.weight(outputs, targets)
        return weighted(mean, weight), weight


@dataclass(frozen=True)
class Averaged:
    """The mean loss of one batch."""

    value: Tensor  # the mean, a scalar tensor; nan where no target counts
    weight: Weight  # the divisor of the mean
    source: str  # a phrase that says what the weight counts, for messages
    ignore_index: int | None = None  # the class index of targets that do not count, if any
    # Whether the gradient may be nan where the weight is 0: not for torch's losses or an empty sum.
    may_break_on_nothing: bool = False
    counted: Weight | None = None  # the number of targets that count, if that is known
    outputs: Any = None  # of the model, if a loss that ran the model returned them
    # Scores [n, classes, ...] and class indices [n, ...], if exactly one class loss was observed.
    classified: tuple[Tensor, Tensor] | None = None


class MeanLoss:
    """A loss function of any reduction, called for its mean and its weight.

    The attribute `loss_fn` is the function as it was passed, and `is_known` says whether it is one
    of torch's losses, whose weight is known without a call.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn
        self.is_known = is_torchs(loss_fn)

    def weight_ahead(self, targets: Any) -> Weight | None:
        """Return the divisor of the mean over these targets; None if only a call shows it.

        A loss that runs the model takes the whole batch in place of the targets.
        """
        if isinstance(self.loss_fn, ModelLoss):
            return self.loss_fn.stated(targets)
        if not self.is_known:
            return None
        return known_weight(self.loss_fn, targets)

    def __call__(self, outputs: Any, targets: Any, weight: Weight | None = None) -> Averaged:
        """Return the mean loss over a batch, whatever reduction the loss uses.

        A scalar counts as a mean unless the loss (or the function that a `functools.partial` wraps)
        says `reduction="sum"`. A tensor of several values holds one for each example, pixel or
        token.

        Args:
            outputs: the model's outputs; for a loss called as loss_fn(model, batch), the model.
            targets: the targets; for such a loss the batch.
            weight: the result of :meth:`weight_ahead` for these targets, if there is one.

        Raises:
            HessianFlowError: the loss returns neither a tensor nor (sum, count) nor an object with
                such a loss.
        """
        if self.is_known:
            return self._call_of_torch(outputs, targets, weight)
        with Observer() as observer:
            result, produced = returned(self.loss_fn(outputs, targets), self.loss_fn)
        averaged = self._averaged(result, targets, observer)
        if weight is None:
            weight = self.weight_ahead(targets)
        if weight is None and averaged.source == EXAMPLES and _is_compiled(outputs):
            raise HessianFlowError(
                "the compiled model hides what its loss divides by: state it with"
                " hf.ModelLoss(weight='examples'), 'tokens', 'next tokens' or a function of the"
                " batch"
            )
        if weight is not None:
            averaged = replace(averaged, weight=weight, source=STATED, may_break_on_nothing=True)
        return replace(averaged, outputs=produced, classified=observer.classified)

    def _averaged(self, result: Any, targets: Any, observer: Observer) -> Averaged:
        if isinstance(result, tuple) and len(result) == 2 and _is_count(result[1]):
            return _divided(*result, isinstance(self.loss_fn, WeightedLoss))
        if not isinstance(result, Tensor):
            raise HessianFlowError(
                f"the loss must be a tensor, or a pair (sum, count), got {_described(result)}: "
                "return the loss alone, with its graph"
            )
        if result.ndim > 0:
            return Averaged(result.mean(), result.numel(), "its values", observer.ignore_index)
        if setting(self.loss_fn, "reduction") == "sum" or observer.is_sum(result):
            examples = num_examples(targets)
            return Averaged(result / examples, examples, EXAMPLES, observer.ignore_index)
        weight, source = observer.divisor(result) or (num_examples(targets), EXAMPLES)
        return Averaged(result, weight, source, observer.ignore_index, source == COUNT)

    def _call_of_torch(self, outputs: Any, targets: Any, weight: Weight | None) -> Averaged:
        result: Any = self.loss_fn(outputs, targets)
        if result.ndim > 0:
            result = result.mean()
        elif setting(self.loss_fn, "reduction") == "sum":
            result = result / num_examples(targets)
        if weight is None:
            weight = known_weight(self.loss_fn, targets)
        if not counts_classes(self.loss_fn, targets):
            return Averaged(result, weight, EXAMPLES)
        counted = None
        if setting(self.loss_fn, "weight") is None and setting(self.loss_fn, "reduction") == "mean":
            counted = weight
        ignore_index = setting(self.loss_fn, "ignore_index")
        return Averaged(result, weight, EXAMPLES, ignore_index, counted=counted)


def _is_compiled(outputs: Any) -> bool:
    """Return whether a model of which a part is compiled stands in place of the outputs."""
    if not isinstance(outputs, nn.Module):
        return False
    modules = [vars(module) for module in outputs.modules()]
    in_place = any(held.get("_compiled_call_impl") is not None for held in modules)
    return in_place or any("_orig_mod" in held["_modules"] for held in modules)


def mean_loss(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """Return the mean loss over one batch, a scalar tensor; see :class:`MeanLoss`."""
    return MeanLoss(loss_fn)(outputs, targets).value


def _divided(total: Any, count: Weight, may_break_on_nothing: bool) -> Averaged:
    """Return the mean of a loss that returned (sum, count): 0 where the count is 0."""
    if not isinstance(total, Tensor) or total.ndim > 0:
        raise HessianFlowError(
            "a loss that returns a pair must return (sum, count), two scalars, got"
            f" {_described(total)} as the sum"
        )
    if isinstance(count, Tensor):
        divisor = torch.where(count > 0, count, 1).to(total.dtype)
        return Averaged(total / divisor, as_weight(count), STATED, None, may_break_on_nothing)
    return Averaged(total / (count or 1), count, STATED, None, may_break_on_nothing)


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return described(value)
