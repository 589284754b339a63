"""The divisor of a mean loss: known for torch's own losses, stated by the user, or guessed.

A batch may be cut into parts: microbatches, the batches of a data set, the batches of several
ranks. The mean loss of the whole is then the mean of the parts' losses, each weighted by the
divisor of its own mean. That divisor is the number of examples for most losses, the number of
targets that count for a token loss with padding, and a sum of class weights for a weighted
cross-entropy. The whole package takes it from here, so gradients, figures and curvature use the
same weights.

- A loss of torch (a class of :mod:`torch.nn`, or a function of :mod:`torch.nn.functional`) is
  known: cross-entropy and NLL over class indices divide by the weights of the targets that are not
  ignored, the others by the number of examples.
- A loss may state its weight: it returns (sum, count), or it is wrapped in :class:`WeightedLoss`,
  or in a :class:`ModelLoss` with a weight.
- Any other callable is observed while it runs. If it returns the result of one of torch's losses,
  of a mean, or of a sum divided by a count, that operation shows the divisor. If it does not but
  calls a loss of torch exactly once, that call shows it. Otherwise examples are counted.

An observed divisor is a guess. It is checked where a batch is cut (:class:`SplitCheck`): the
weighted mean over two parts of some rows must equal the loss of these rows taken together.
"""

from hessianflow.losses.batch_loss import BatchLoss, Forwarded
from hessianflow.losses.mean import Averaged, MeanLoss, WeightedLoss, mean_loss
from hessianflow.losses.model_loss import ModelLoss
from hessianflow.losses.split_check import SplitCheck, untouched
from hessianflow.losses.weights import Weight, exact_type, weighted

__all__ = [
    "Averaged",
    "BatchLoss",
    "Forwarded",
    "MeanLoss",
    "ModelLoss",
    "SplitCheck",
    "Weight",
    "WeightedLoss",
    "exact_type",
    "mean_loss",
    "untouched",
    "weighted",
]
