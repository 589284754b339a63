"""Size and work of a network: parameters, and multiply-adds of one forward pass."""

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers in the model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of all convolutions and linear layers for one input.

    A convolution costs out_positions * out_channels * in_channels / groups * kernel area, a linear
    layer outputs * inputs (the classifier is included). Biases, normalisation, activations, pooling
    and additions are not counted. The pass runs in eval mode without gradients; afterwards the
    modes of the model are restored. `input_shape` is that of one input without the batch dimension,
    such as (T,) for a model that begins with an embedding of T tokens. The products inside
    attention are not counted.
    """
    counts: list[int] = []

    def record(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        # Every output number of such a layer is one product with a row of the weight.
        counts.append(output.numel() * layer.get_parameter("weight")[0].numel())

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    like = next(model.parameters(), torch.zeros(()))
    leaves = (module for module in model.modules() if not any(True for _ in module.children()))
    dtype = like.dtype
    if isinstance(next(leaves), nn.Embedding):
        dtype = torch.int64
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, dtype=dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return sum(counts)
