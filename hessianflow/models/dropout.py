"""Dropout before the head of any network that ends in a linear layer."""

from torch import nn

from hessianflow.interfaces import HessianFlowError


def with_head_dropout(model: nn.Module, probability: float = 0.0) -> nn.Module:
    """Put a dropout layer before the last `torch.nn.Linear`, in place, and return the model.

    That layer becomes a sequence of two, so its parameters get a longer name (`11.weight` becomes
    `11.1.weight`).

    Raises:
        HessianFlowError: The model holds no linear layer.
    """
    modules = model.named_modules()
    last = [name for name, module in modules if isinstance(module, nn.Linear) and name]
    if not last:
        raise HessianFlowError(
            f"dropout goes in front of a last linear layer: {type(model).__name__} holds none"
        )
    parent, _, name = last[-1].rpartition(".")
    holder = model.get_submodule(parent)
    layer: nn.Module = getattr(holder, name)
    setattr(holder, name, nn.Sequential(nn.Dropout(probability), layer).train(layer.training))
    return model
