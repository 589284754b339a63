"""Residual networks (He, Zhang, Ren, Sun, 2015, arXiv:1512.03385).

Two families:

- `cifar_resnet`: the thin networks of section 4.2, depth 6n+2, widths 16, 32, 64. The shortcut
  between stages is option A (subsample, pad with zeros, no parameters; the paper's choice for
  CIFAR) or option B (1x1 convolution with batch normalisation; the default, since the
  adaptive-batch-size experiments used it). Networks of depth 44 and more have bottleneck blocks, as
  in those experiments: with n = (depth - 2) / 6 blocks per stage, such a network has 9n+2
  convolutions and is larger than the basic-block network of the same name elsewhere.
- `imagenet_resnet`: ResNet-18, -34 and -50, widths 64 to 512, with the 7x7 stem and pooling of
  section 4.1 or with a 3x3 stem of stride 1 for small images (stem="cifar").

Convolutions start from N(0, sqrt(2 / (k^2 * out_channels))) and have no biases. ResNet-50 has the
stride in the 3x3 convolution (the usual later form), not in the first 1x1.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad, relu

Shortcut = Literal["A", "B"]
Stem = Literal["cifar", "imagenet"]
IMAGENET_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class PaddedShortcut(nn.Module):
    """Option A: take every `stride`-th pixel, and add channels of zeros, half of them before."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C + new_channels, H/stride, W/stride]."""
        before = self.new_channels // 2
        kept = inputs[:, :, :: self.stride, :: self.stride]
        return pad(kept, (0, 0, 0, 0, before, self.new_channels - before))


class ResidualBlock(nn.Module):
    """The residual block relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H/stride, W/stride]."""
        return relu(self.body(inputs) + self.shortcut(inputs))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B"
) -> nn.Sequential:
    """Build ResNet-(6n+2) for small images: input [N, in_channels, H, W], output [N, num_classes].

    ResNet-20 has 272,474 parameters with shortcut "B", 269,722 with "A" (10 classes).
    """
    depths = ((depth - 2) // 6,) * 3
    stem = _conv_norm(in_channels, 16, 3), nn.ReLU(inplace=True)
    widths = (16, 32, 64)
    return _assemble(stem, depths, widths, num_classes, shortcut, bottleneck=depth >= 44)


def imagenet_resnet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stem: Stem = "imagenet",
    shortcut: Shortcut = "B",
) -> nn.Sequential:
    """Build ResNet-18, -34 or -50: input [N, in_channels, H, W], output [N, num_classes].

    ResNet-18 has 11,689,512 parameters (stem "imagenet", 1000 classes), 11,173,962 ("cifar", 10).
    """
    layers: list[nn.Module] = [_conv_norm(in_channels, 64, 3), nn.ReLU(inplace=True)]
    if stem == "imagenet":
        layers = [
            _conv_norm(in_channels, 64, 7, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    depths = IMAGENET_DEPTHS[depth]
    widths = (64, 128, 256, 512)
    return _assemble(layers, depths, widths, num_classes, shortcut, bottleneck=depth == 50)


def init_convolutions(model: nn.Module) -> None:
    """Draw every convolution from N(0, sqrt(2 / (k^2 * out_channels))).

    This is the fan-out form of He et al., 2015, arXiv:1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _assemble(
    stem: Sequence[nn.Module],
    depths: Sequence[int],
    widths: Sequence[int],
    num_classes: int,
    shortcut: Shortcut,
    *,
    bottleneck: bool,
) -> nn.Sequential:
    layers = list(stem)
    channels = widths[0]  # of the stem
    make_body = _bottleneck if bottleneck else _basic
    expansion = 4 if bottleneck else 1
    stride = 1  # of the next block; every stage but the first begins with 2
    for depth, width in zip(depths, widths, strict=True):
        out_channels = expansion * width
        for _ in range(depth):
            body = make_body(channels, width, stride)
            layers.append(ResidualBlock(body, _shortcut(channels, out_channels, stride, shortcut)))
            channels = out_channels
            stride = 1
        stride = 2
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    model = nn.Sequential(*layers, *head)
    init_convolutions(model)
    return model


def _basic(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _conv_norm(in_channels, width, 3, stride),
        nn.ReLU(inplace=True),
        _conv_norm(width, width, 3),
    )


def _bottleneck(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _conv_norm(in_channels, width, 1),
        nn.ReLU(inplace=True),
        _conv_norm(width, width, 3, stride),
        nn.ReLU(inplace=True),
        _conv_norm(width, 4 * width, 1),
    )


def _shortcut(in_channels: int, out_channels: int, stride: int, option: Shortcut) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(out_channels - in_channels, stride)
    return _conv_norm(in_channels, out_channels, 1, stride)


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> nn.Sequential:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
