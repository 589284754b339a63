"""Residual networks (He, Zhang, Ren, Sun, 2015, arXiv:1512.03385).

Two families:

- `cifar_resnet`: the thin networks of section 4.2, depth 6n+2, widths 16, 32, 64. The shortcut
  between stages is option A (subsample, pad with zeros, no parameters; the paper's choice for
  CIFAR) or option B (1x1 convolution with batch normalisation; what the adaptive-batch-size
  experiments used, hence the default). Depth 44 and more uses bottleneck blocks, as those
  experiments did: with n = (depth - 2) / 6 blocks a stage, such a network has 9n+2 convolutions and
  is larger than the basic-block network that carries the same name elsewhere.
- `imagenet_resnet`: ResNet-18, -34 and -50, widths 64 to 512, with the 7x7 stem and pooling of
  section 4.1 or with a 3x3 stem of stride 1 for small images (stem="cifar").

Convolutions start from N(0, sqrt(2 / (k^2 * out_channels))), no biases. ResNet-50 puts the stride
on the 3x3 convolution (the usual later form), not on the first 1x1.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad, relu

Shortcut = Literal["A", "B"]
Stem = Literal["cifar", "imagenet"]


class PaddedShortcut(nn.Module):
    """Option A: every `stride`-th pixel, new channels filled with zeros (half before, half
    after)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + new_channels, H/stride, W/stride]."""
        before = self.new_channels // 2
        kept = inputs[:, :, :: self.stride, :: self.stride]
        return pad(kept, (0, 0, 0, 0, before, self.new_channels - before))


class ResidualBlock(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H/stride, W/stride]."""
        return relu(self.body(inputs) + self.shortcut(inputs))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B"
) -> nn.Sequential:
    """ResNet-(6n+2) for small images; see the module docstring. Input [N, in_channels, H, W],
    output [N, num_classes].

    ResNet-20 has 272,474 parameters with shortcut "B", 269,722 with "A" (10 classes).
    """
    depths = ((depth - 2) // 6,) * 3
    stem = _conv_norm(in_channels, 16, 3), nn.ReLU(inplace=True)
    return _assemble(
        stem,
        16,
        depths,
        (16, 32, 64),
        bottleneck=depth >= 44,
        shortcut=shortcut,
        num_classes=num_classes,
    )


def imagenet_resnet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stem: Stem = "imagenet",
    shortcut: Shortcut = "B",
) -> nn.Sequential:
    """ResNet-18, -34 or -50. Input [N, in_channels, H, W], output [N, num_classes].

    ResNet-18 has 11,689,512 parameters (imagenet stem, 1000 classes), 11,173,962 (cifar stem, 10
    classes).
    """
    layers: list[nn.Module] = [_conv_norm(in_channels, 64, 3), nn.ReLU(inplace=True)]
    if stem == "imagenet":
        layers = [
            _conv_norm(in_channels, 64, 7, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    depths = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    widths = (64, 128, 256, 512)
    return _assemble(
        layers,
        64,
        depths,
        widths,
        bottleneck=depth == 50,
        shortcut=shortcut,
        num_classes=num_classes,
    )


def init_convolutions(model: nn.Module) -> None:
    """N(0, sqrt(2 / (k^2 * out_channels))) for every convolution (He et al., 2015,
    arXiv:1502.01852, fan-out form)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _assemble(
    stem: Sequence[nn.Module],
    channels: int,
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    bottleneck: bool,
    shortcut: Shortcut,
    num_classes: int,
) -> nn.Sequential:
    layers = list(stem)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            out_channels = 4 * width if bottleneck else width
            body = (
                _bottleneck(channels, width, stride)
                if bottleneck
                else _basic(channels, width, stride)
            )
            layers.append(ResidualBlock(body, _shortcut(channels, out_channels, stride, shortcut)))
            channels = out_channels
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
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
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
