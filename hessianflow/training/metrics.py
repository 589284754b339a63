"""The user's own metrics, measured after every epoch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import as_batches, num_examples, to_device
from hessianflow.interfaces import HessianFlowError, LossFn
from hessianflow.losses import BatchLoss
from hessianflow.measuring import measuring
from hessianflow.structure import TARGET_NAMES, article, entries, entry_names

Metric = Any
"""An object with `update(outputs, targets)`, `compute()` and `reset()`, like those of torchmetrics,
or a function (outputs, targets) -> number, which is averaged over examples."""


class Metrics:
    """Metrics of the model on held-out data in evaluation mode, recorded after every epoch.

    Pass it in `AfterEpoch(measurements=[...])`. The model is left unchanged. Each of several ranks
    measures all data.

    Args:
        model: the model, wrapped or not.
        data: one batch or a re-iterable of batches.
        loss_fn: the loss, as in training; its form decides how the model is run.
        metrics: the metrics by name. A metric object must be on the device of the model.
        select: function of the model's outputs and the batch that returns (outputs, targets) for a
            metric. None takes the targets of a pair, or the entry 'labels' (or 'label', 'targets',
            'target', 'y') of a batch with names.
        kind: the kind of the records.

    Raises:
        HessianFlowError: a metric is neither such an object nor a function. When it is called: a
            loss that runs the model returns no outputs, or a batch has no targets.

    Example:
        >>> batch = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
        >>> def accuracy(outputs, targets):
        ...     return (outputs.argmax(1) == targets).float().mean()
        >>> model = nn.Linear(2, 2)
        >>> _ = model.bias.data.copy_(torch.tensor([1.0, 0.0]))
        >>> Metrics(model, batch, nn.CrossEntropyLoss(), {"hits": accuracy})()
        ({'hits': 0.75}, '')
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any | Iterable[Any],
        loss_fn: LossFn,
        metrics: Mapping[str, Metric],
        *,
        select: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        kind: str = "metrics",
    ) -> None:
        for name, metric in metrics.items():
            if not _is_object(metric) and not callable(metric):
                raise HessianFlowError(
                    f"metrics[{name!r}] must have update, compute and reset, or be a function"
                    f" (outputs, targets), got {article(metric)}"
                )
        self.kind = kind
        self._model = model
        self._data = data
        self._loss = BatchLoss(loss_fn)
        self._metrics = dict(metrics)
        self._select = select or _outputs_and_targets

    def __call__(self) -> tuple[Mapping[str, float], str]:
        """Return the metrics over all data, by name, and no warning."""
        device = next(self._model.parameters()).device
        sums: dict[str, Any] = dict.fromkeys(self._metrics, 0.0)
        examples = 0
        for metric in self._metrics.values():
            if _is_object(metric):
                metric.reset()
        with measuring(self._model) as inner, torch.no_grad():
            for batch in as_batches(self._data):
                local = to_device(batch, device)
                outputs, targets = self._select(self._loss(inner, local).outputs, local)
                count = num_examples(local)
                examples += count
                for name, metric in self._metrics.items():
                    if _is_object(metric):
                        metric.update(outputs, targets)
                    else:
                        sums[name] += metric(outputs, targets) * count
        if examples == 0:
            raise HessianFlowError("the data of the metrics are empty: pass at least one example")
        figures: dict[str, float] = {}
        for name, metric in self._metrics.items():
            value = sums[name] / examples
            if _is_object(metric):
                value = metric.compute()
            figures[name] = _number(name, value)
        return figures, ""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, because every call measures anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, because there is no state."""


def _is_object(metric: Any) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise HessianFlowError(
            f"metrics[{name!r}] must return one number, got a tensor of shape"
            f" {list(value.shape)}: average over classes"
        )
    return float(value)  # The host waits for the device, once an epoch.


def _outputs_and_targets(outputs: Any, batch: Any) -> tuple[Any, Any]:
    if outputs is None:
        raise HessianFlowError(
            "the loss runs the model and returns no outputs for the metrics: let it return an"
            " object with loss and logits, or pass hf.ModelLoss(function, outputs=...)"
        )
    named = dict(zip(entry_names(batch), entries(batch) or (), strict=True))
    known = (*(f"[{key!r}]" for key in TARGET_NAMES), *(f".{key}" for key in TARGET_NAMES), "[1]")
    for name in known:
        if name in named:
            return outputs, named[name]
    raise HessianFlowError(
        f"{article(batch)} has no entry called {' or '.join(TARGET_NAMES)} for the metrics: pass"
        " Metrics(select=...), a function (outputs, batch) that returns (outputs, targets)"
    )
