"""Small convolutional networks: one for 8x8 digits, and the two plain ones of the ABSA experiments.

C1 and C2 follow the layer tables of the adaptive-batch-size experiments (Yao, Gholami, Keutzer,
Mahoney, 2018, arXiv:1810.01021): 1,756,682 and 1,148,746 parameters for 32x32 RGB images and 10
classes. Batch normalisation comes after the ReLU in both. `digits_cnn` is a network of our own.

Deviations: other input sizes are accepted (the first fully connected layer adapts); the dropout
that the published C2 defines but never applies is left out.
"""

from torch import nn


def digits_cnn(num_classes: int = 10, input_size: int = 8, in_channels: int = 1) -> nn.Sequential:
    """Build three 3x3 convolutions of 32, 32 and 64 channels, two poolings and a linear layer.

    The network has batch normalisation, and 30,762 parameters for 1x8x8 images and 10 classes.
    Inputs are [N, in_channels, input_size, input_size], outputs [N, num_classes].
    """
    return nn.Sequential(
        *_conv_norm_relu(in_channels, 32),
        *_conv_norm_relu(32, 32),
        nn.MaxPool2d(2),
        *_conv_norm_relu(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (input_size // 4) ** 2, num_classes),
    )


def c1(num_classes: int = 10, input_size: int = 32, in_channels: int = 3) -> nn.Sequential:
    """Build C1: two 5x5 convolutions of 64 channels with 3x3 pooling, then 384-192-classes."""
    side = (input_size + 3) // 4  # two poolings of stride 2, each rounding up
    return nn.Sequential(
        *_conv_relu_norm(in_channels, 64, kernel_size=5, padding=2),
        nn.MaxPool2d(3, stride=2, padding=1),
        *_conv_relu_norm(64, 64, kernel_size=5, padding=2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        *_classifier(64 * side**2, (384, 192), num_classes),
    )


def c2(num_classes: int = 10, input_size: int = 32, in_channels: int = 3) -> nn.Sequential:
    """Build C2: pairs of unpadded 3x3 convolutions of 64 and 128 channels, then 256-256-classes."""
    side = ((input_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *_conv_relu_norm(in_channels, 64, kernel_size=3, padding=0),
        *_conv_relu_norm(64, 64, kernel_size=3, padding=0),
        nn.MaxPool2d(2),
        *_conv_relu_norm(64, 128, kernel_size=3, padding=0),
        *_conv_relu_norm(128, 128, kernel_size=3, padding=0),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_classifier(128 * side**2, (256, 256), num_classes),
    )


def _conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _conv_relu_norm(
    in_channels: int, out_channels: int, *, kernel_size: int, padding: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding),
        nn.ReLU(),
        nn.BatchNorm2d(out_channels),
    ]


def _classifier(features: int, hidden: tuple[int, ...], num_classes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return [*layers, nn.Linear(features, num_classes)]
