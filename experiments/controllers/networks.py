"""Networks of the study that the toolkit does not bring."""

from torch import nn


def plain(num_classes: int = 10, input_size: int = 32, in_channels: int = 3) -> nn.Sequential:
    """Four 3x3 convolutions (32, 32, 64, 64 channels), two poolings, two linear layers; no
    normalisation anywhere.

    Inputs [N, in_channels, input_size, input_size], outputs [N, num_classes].
    """
    side = input_size // 4
    return nn.Sequential(
        *_convolution(in_channels, 32),
        *_convolution(32, 32),
        nn.MaxPool2d(2),
        *_convolution(32, 64),
        *_convolution(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side**2, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, nn.ReLU()]
