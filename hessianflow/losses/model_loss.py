"""Losses that run the model themselves, and what they return."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from hessianflow.batches import num_examples
from hessianflow.interfaces import HessianFlowError
from hessianflow.losses.weights import IGNORE_INDEX, as_weight
from hessianflow.structure import article, is_list, is_plain, tensors_in

CountedAs = Literal["examples", "tokens", "next tokens"]


def _next_tokens(batch: Any) -> Tensor:
    return (_labels(batch)[..., 1:] != IGNORE_INDEX).sum()


def _tokens(batch: Any) -> Tensor:
    return (_labels(batch) != IGNORE_INDEX).sum()


def _labels(batch: Any) -> Tensor:
    labels = _member(batch, "labels")
    if not isinstance(labels, Tensor):
        raise HessianFlowError(
            f"ModelLoss: tokens are counted in a tensor 'labels', and {article(batch)} has none:"
            " pass weight=function"
        )
    return labels


_COUNTS: dict[str, Callable[[Any], Any]] = {
    "examples": num_examples,
    "tokens": _tokens,
    "next tokens": _next_tokens,
}


class ModelLoss(nn.Module):
    """A loss of a model and a whole batch, by default the model's own.

    Use it for models that compute their loss, such as those of transformers, and for batches of any
    form: one mapping, a dataclass, or a tuple of inputs, targets and weights. A plain function is
    called in the same way for a batch that is a mapping or a dataclass.

    Args:
        function: function(model, batch), which returns a mean as a scalar, a pair (sum, count), or
            an object (or mapping) with `loss`, and with `logits` if Gauss-Newton matrices or
            metrics need them. None: model(**batch), without the entries that are text.
        weight: the divisor of that mean. "examples": the number of examples. "tokens": the number
            of entries of 'labels' that are not -100. "next tokens": the same number without the
            first entry of each example, which a causal language model does not predict. Or a
            function of the batch that returns a number or a scalar tensor, at least 0. None: the
            divisor is observed (:mod:`hessianflow.losses`), which works for the losses of
            transformers. A stated weight is not checked.
        outputs: picks the outputs, a single tensor, from the object that `function` returns, for
            Gauss-Newton matrices and metrics. None: `logits`.

    Example:
        >>> import torch
        >>> def error(model, batch):
        ...     outputs = model(batch["x"])
        ...     return {"loss": (outputs - batch["y"]).square().mean(), "logits": outputs}
        >>> loss_fn = ModelLoss(error)
        >>> batch = {"x": torch.ones(3, 2), "y": torch.zeros(3, 1)}
        >>> sorted(loss_fn(nn.Linear(2, 1), batch))
        ['logits', 'loss']
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any] | None = None,
        *,
        weight: Callable[[Any], Any] | CountedAs | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(weight, str):
            if weight not in _COUNTS:
                raise HessianFlowError(
                    f"ModelLoss: weight must be one of {', '.join(map(repr, _COUNTS))} or a"
                    f" function of the batch, got {weight!r}"
                )
            weight = _COUNTS[weight]
        for name, value in (("function", function), ("weight", weight), ("outputs", outputs)):
            if value is not None and not callable(value):
                raise HessianFlowError(
                    f"ModelLoss: {name} must be a function or None, got {article(value)}"
                )
        self.function = function
        self.weight = weight
        self.outputs = outputs

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return what the function, or the model, returns for a batch."""
        if self.function is not None:
            return self.function(model, batch)
        return model(**_arguments(batch))

    def stated(self, batch: Any) -> int | float | Tensor | None:
        """Return the divisor that the user states for a batch; None if it has to be observed."""
        if self.weight is None:
            return None
        weight: int | float | Tensor = self.weight(batch)
        if isinstance(weight, Tensor) and weight.ndim == 0:
            return as_weight(weight)
        if not isinstance(weight, (int, float)):
            raise HessianFlowError(
                f"ModelLoss: weight must return a number or a scalar tensor, got {_shown(weight)}:"
                " return the sum over the batch"
            )
        return weight


class Returned(NamedTuple):
    """The parts of what a loss returned."""

    loss: Any  # a tensor, or a pair (sum, count)
    outputs: Any = None  # of the model, if the loss returned them as well


def returned(result: Any, loss_fn: Any) -> Returned:
    """Return the loss and the outputs in what `loss_fn` returned.

    Raises:
        HessianFlowError: the result is an object without a loss.
    """
    if isinstance(result, (Tensor, tuple)):
        return Returned(result)
    held = _member(result, "loss")
    if held is None:
        if not isinstance(result, Mapping) and not hasattr(result, "loss"):
            return Returned(result)
        raise HessianFlowError(
            f"{article(result)} was returned without a loss: put the targets ('labels') into the"
            " batch, or pass hf.ModelLoss(function) with a function that computes the loss"
        )
    if isinstance(loss_fn, ModelLoss) and loss_fn.outputs is not None:
        return Returned(held, loss_fn.outputs(result))
    return Returned(held, _member(result, "logits"))


def logits_of(outputs: Any) -> Any:
    """Return the `logits` of outputs that hold them, such as those of transformers.

    Other outputs are returned as they are.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = None
    # A plain dict, list or tuple comes from the user's own model, and the user's loss reads it.
    if type(outputs) not in (dict, list, tuple):
        logits = _member(outputs, "logits")
    if isinstance(logits, Tensor):
        return logits
    return outputs


def _member(held: Any, name: str) -> Any:
    if isinstance(held, Mapping):
        return held.get(name)
    return getattr(held, name, None)


def _arguments(batch: Any) -> dict[str, Any]:
    """Return the entries of a batch by name, without text, which no model takes."""
    named: Mapping[str, Any]
    if isinstance(batch, Mapping):
        named = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    else:
        raise HessianFlowError(
            "hf.ModelLoss() calls model(**batch) and needs a batch with names, such as a dict, got"
            f" {article(batch)}: pass hf.ModelLoss(function) with a function(model, batch)"
        )
    return {str(name): value for name, value in named.items() if not _is_text(value)}


def _is_text(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return True
    return is_list(value) and bool(value) and not tensors_in(value) and is_plain(value[0])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return article(value)
