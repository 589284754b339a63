"""The mean loss of a model on one batch, whatever the form of the batch and of the loss.

There are two forms. For a pair (inputs, targets), the model is called as model(inputs) and the loss
as loss_fn(outputs, targets). Outputs that hold `logits`, such as those of transformers, are
replaced by their logits. For any other batch (a mapping or a dataclass), and always if the loss is
a :class:`ModelLoss`, the loss is called as loss_fn(model, batch) and runs the model. Training,
evaluation and curvature all call the loss through this module, so they agree on the form.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from hessianflow.batches import as_pair, is_pair
from hessianflow.interfaces import HessianFlowError, LossFn
from hessianflow.losses.mean import Averaged, MeanLoss, WeightedLoss
from hessianflow.losses.model_loss import ModelLoss, logits_of
from hessianflow.losses.weights import Weight
from hessianflow.structure import entries, is_list


class Forwarded(NamedTuple):
    """The results of a forward pass over one batch."""

    averaged: Averaged
    outputs: Any  # of the model; None if a loss that runs the model returned only the loss
    # The arguments of the loss: outputs and targets, or the model and the batch.
    arguments: tuple[Any, Any]


class BatchLoss:
    """The mean loss of a model on a batch.

    Args:
        loss_fn: see :data:`hessianflow.interfaces.LossFn`.

    Attributes:
        loss_fn: the loss as it was passed.
        mean: the loss for outputs and targets, or for model and batch.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn
        self.mean = MeanLoss(loss_fn)
        innermost: Any = loss_fn
        while isinstance(innermost, WeightedLoss):
            innermost = innermost.loss_fn
        self._always_runs_model = isinstance(innermost, ModelLoss)

    def takes_pair(self, batch: Any) -> bool:
        """Return whether the loss is called with outputs and targets for this batch.

        Raises:
            HessianFlowError: the batch is not a pair, and either the loss is one of torch's or the
                batch has no names.
        """
        if self._always_runs_model:
            return False
        if is_pair(batch):
            return True
        if self.mean.is_known or is_list(batch) or entries(batch) is None:
            as_pair(batch)  # raises the error that says what is wrong
        return False

    def weight_ahead(self, batch: Any) -> Weight | None:
        """Return the divisor of the mean over a batch; None if only a call shows it."""
        if self._always_runs_model:
            return self.mean.weight_ahead(batch)
        if self.mean.is_known and is_pair(batch):
            return self.mean.weight_ahead(batch[1])
        return None

    def __call__(self, model: nn.Module, batch: Any, ahead: Weight | None = None) -> Forwarded:
        """Run the model on a batch on its device.

        Args:
            model: called in its current mode.
            batch: a batch in either form.
            ahead: the result of :meth:`weight_ahead` for this batch, if there is one.

        Raises:
            HessianFlowError: as for :class:`MeanLoss`, or batch and loss do not fit each other.
        """
        if not self.takes_pair(batch):
            averaged = self.mean(model, batch, ahead)
            return Forwarded(averaged, averaged.outputs, (model, batch))
        inputs, targets = batch
        return self.of_outputs(model(inputs), targets, ahead)

    def of_outputs(self, returned: Any, targets: Any, ahead: Weight | None = None) -> Forwarded:
        """Return the results for a pair, given what the model returned for its inputs."""
        outputs = logits_of(returned)
        try:
            averaged = self.mean(outputs, targets, ahead)
        except AttributeError as error:
            if outputs is returned or not isinstance(outputs, Tensor):
                raise
            raise HessianFlowError(
                f"the loss receives outputs.logits of the {type(returned).__name__}, a tensor, not"
                f" the object itself ({error}): use the tensor, or hf.ModelLoss(function)"
            ) from error
        return Forwarded(averaged, outputs, (outputs, targets))
