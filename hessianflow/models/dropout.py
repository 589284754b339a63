"""Dropout in front of the head of any network that ends in a linear layer."""

from torch import nn

from hessianflow.interfaces import HessianFlowError


def with_head_dropout(model: nn.Module, probability: float = 0.0) -> nn.Module:
    """The same model, changed in place: a dropout layer in front of its last `torch.nn.Linear`.

    That layer becomes a sequence of two, so its parameters go by a longer name (`11.weight` becomes
    `11.1.weight`).

    Raises:
        HessianFlowError: no linear layer inside the model.
    """
    last = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name
    ]
    if not last:
        raise HessianFlowError(
            f"dropout goes in front of a last linear layer: {type(model).__name__} holds none"
        )
    parent, _, name = last[-1].rpartition(".")
    holder = model.get_submodule(parent)
    layer: nn.Module = getattr(holder, name)
    setattr(holder, name, nn.Sequential(nn.Dropout(probability), layer).train(layer.training))
    return model
