"""What must hold before a run can start."""

from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError


def check_run(model: nn.Module, optimizer: Optimizer, batch_size: int, num_examples: int, epochs: int) -> None:
    """Refuse a run that cannot train.

    Raises:
        HessianFlowError: no trainable parameter, an optimizer of another model, no epochs, or a batch size outside
            1 to `num_examples`.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise HessianFlowError("the model has no trainable parameter: nothing to train")
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise HessianFlowError("the optimizer holds no trainable parameter of the model: build it from this model")
    if epochs < 1:
        raise HessianFlowError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= num_examples:
        raise HessianFlowError(f"batch size {batch_size} must lie between 1 and the {num_examples} training examples")
