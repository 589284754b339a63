"""SqueezeNext (Gholami, Kwon, Wu, Tai, Yue, Jin, Zhao, Keutzer, 2018, arXiv:1803.10615).

A block narrows twice with 1x1 convolutions, then applies a 3x1 and a 1x3 convolution, widens with a
1x1 convolution, and adds the shortcut. Every convolution is followed by batch normalisation and
ReLU, also the last of the block and that of the shortcut; another ReLU follows the addition. The
shortcut is a 1x1 convolution in the first block of every stage, and the identity in all others.

Styles:

- "caffe" (default): the networks that the authors published for Caffe. They have no biases; 3x1 and
  1x3 are swapped in every second block, counted over the whole network; stem (64) and tail (128)
  keep their width for every multiplier; "v5" has a 5x5 stem, and the first block of each of its
  stages works on the output of the projected shortcut.
- "pytorchcv": the networks of the widely used re-implementation. They have biases; 1x3 is always
  before 3x1; the multiplier scales stem and tail; the stem is padded by one pixel; "v5" differs
  only in its stage depths.

Variants: "imagenet" has a 7x7 stem of stride 2 and a pooling; "cifar" has a 3x3 stem of stride 1 (2
from 64 pixels on) and no pooling. The paper has no "cifar" variant: it follows a public port, with
scaled stem and tail and an ordinary v5 in both styles.

"G" networks use two groups in the first narrowing and in the 3x1 and 1x3 convolutions. The stage
depths of the 34 and 44 networks, (9, 9, 12, 2) and (12, 12, 16, 2), are inferred from their names
and published sizes. Weights start uniform with variance 1 / fan-in, biases at zero.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from hessianflow.interfaces import HessianFlowError

Style = Literal["caffe", "pytorchcv"]
STAGE_WIDTHS = (32, 64, 128, 256)
STAGE_STRIDES = (1, 2, 2, 2)


@dataclass(frozen=True)
class SqueezeNextShape:
    """The shape of one network of the family.

    Attributes:
        depths: Blocks in each of the four stages.
        multiplier: Factor of the stage widths 32, 64, 128, 256.
        groups: Groups of the grouped convolutions.
        v5: Whether it is the variant with a 5x5 stem and projected inputs (style "caffe" for
            ImageNet only).

    Raises:
        HessianFlowError: The groups do not divide a quarter of the width of the first stage.
    """

    depths: tuple[int, int, int, int] = (6, 6, 8, 1)
    multiplier: float = 1.0
    groups: int = 1
    v5: bool = False

    def __post_init__(self) -> None:
        quarter = STAGE_WIDTHS[0] * self.multiplier / 4
        if quarter <= 0 or quarter % self.groups:
            raise HessianFlowError(
                f"multiplier must make a quarter of {STAGE_WIDTHS[0]} * multiplier a positive"
                f" multiple of groups={self.groups}, got {self.multiplier}: a quarter is"
                f" {quarter:g} channels"
            )


_V5_DEPTHS = (2, 4, 14, 1)
CAFFE = {
    "squeezenext-1.0-23": SqueezeNextShape(),
    "squeezenext-1.0-g-23": SqueezeNextShape(groups=2),
    "squeezenext-1.0-23v5": SqueezeNextShape(_V5_DEPTHS, v5=True),
    "squeezenext-2.0-23": SqueezeNextShape(multiplier=2.0),
    "squeezenext-2.0-23v5": SqueezeNextShape(_V5_DEPTHS, multiplier=2.0, v5=True),
    "squeezenext-1.0-34": SqueezeNextShape((9, 9, 12, 2)),
    "squeezenext-1.0-44": SqueezeNextShape((12, 12, 16, 2)),
    "squeezenext-2.0-44": SqueezeNextShape((12, 12, 16, 2), multiplier=2.0),
}
PYTORCHCV = {
    f"squeezenext-{multiplier}-23{suffix}@pytorchcv": SqueezeNextShape(
        depths, multiplier, v5=bool(suffix)
    )
    for multiplier in (1.0, 1.5, 2.0)
    for suffix, depths in (("", (6, 6, 8, 1)), ("v5", _V5_DEPTHS))
}


class ConvUnit(nn.Sequential):
    """A convolution with batch normalisation and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class SqueezeNextBlock(nn.Module):
    """A SqueezeNext block, which the module docstring describes.

    Args:
        in_channels, out_channels: Numbers C_in and C of channels; C is a multiple of 4.
        stride: Stride of the whole block.
        project: Whether the shortcut is a 1x1 convolution and not the identity.
        groups: Groups of the first narrowing and of the 3x1 and 1x3 convolutions.
        bias: Whether the convolutions have biases.
        vertical_first: Whether 3x1 comes before 1x3.
        reads_shortcut: Whether the body reads the output of the shortcut, which then has the whole
            stride (v5).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        project: bool = False,
        groups: int = 1,
        bias: bool = False,
        vertical_first: bool = True,
        reads_shortcut: bool = False,
    ) -> None:
        super().__init__()
        half = out_channels // 2
        quarter = out_channels // 4
        kernels = [(1, 3), (3, 1)]
        if vertical_first:
            kernels.reverse()
        first, second = kernels
        self.reads_shortcut = reads_shortcut
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = ConvUnit(in_channels, out_channels, stride=stride, bias=bias)
        if reads_shortcut:
            in_channels = out_channels
            stride = 1
        self.body = nn.Sequential(
            ConvUnit(in_channels, half, stride=stride, groups=groups, bias=bias),
            ConvUnit(half, quarter, bias=bias),
            ConvUnit(quarter, half, first, padding=_same(first), groups=groups, bias=bias),
            ConvUnit(half, half, second, padding=_same(second), groups=groups, bias=bias),
            ConvUnit(half, out_channels, bias=bias),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C_in, H, W] to [N, C, H/stride, W/stride]."""
        shortcut = self.shortcut(inputs)
        if self.reads_shortcut:
            inputs = shortcut
        return relu(self.body(inputs) + shortcut, inplace=True)


def squeezenext(
    shape: SqueezeNextShape,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    style: Style = "caffe",
    variant: Literal["cifar", "imagenet"] = "imagenet",
    input_size: int = 227,
) -> nn.Sequential:
    """Build a SqueezeNext: input [N, in_channels, H, W], output [N, num_classes].

    1.0-SqNxt-23 in style "caffe" has 718,280 parameters for ImageNet, 582,890 for CIFAR-10.
    """
    scaled = style == "pytorchcv" or variant == "cifar"
    faithful_v5 = shape.v5 and not scaled
    bias = style == "pytorchcv"
    multiplier = shape.multiplier if scaled else 1
    stem_width = round(64 * multiplier)
    tail_width = round(128 * multiplier)
    small = variant == "cifar"
    stem = _stem(in_channels, stem_width, input_size, small=small, v5=faithful_v5, bias=bias)
    swapped = style == "caffe"
    blocks, channels = _blocks(shape, stem_width, bias=bias, swapped=swapped, v5=faithful_v5)
    tail = ConvUnit(channels, tail_width, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*stem, *blocks, *tail, nn.Linear(tail_width, num_classes))
    _initialise(model)
    return model


def _stem(
    in_channels: int, width: int, input_size: int, *, small: bool, v5: bool, bias: bool
) -> list[nn.Module]:
    if small:
        stride = 2 if input_size >= 64 else 1
        return [ConvUnit(in_channels, width, 3, stride=stride, padding=1, bias=bias)]
    padding = int(bias)  # the style with biases has a padded stem
    kernel_size = 5 if v5 else 7
    conv = ConvUnit(in_channels, width, kernel_size, stride=2, padding=padding, bias=bias)
    return [conv, nn.MaxPool2d(3, stride=2, ceil_mode=True)]


def _blocks(
    shape: SqueezeNextShape, channels: int, *, bias: bool, swapped: bool, v5: bool
) -> tuple[list[nn.Module], int]:
    blocks: list[nn.Module] = []
    for depth, width, stride in zip(shape.depths, STAGE_WIDTHS, STAGE_STRIDES, strict=True):
        out_channels = round(width * shape.multiplier)
        for index in range(depth):
            first = index == 0
            block = SqueezeNextBlock(
                channels,
                out_channels,
                stride=stride,
                project=first,
                groups=shape.groups,
                bias=bias,
                vertical_first=swapped and len(blocks) % 2 == 0,
                reads_shortcut=v5 and first,
            )
            blocks.append(block)
            channels = out_channels
            stride = 1  # of all but the first block of a stage
    return blocks, channels


def _same(kernel_size: tuple[int, int]) -> tuple[int, int]:
    return kernel_size[0] // 2, kernel_size[1] // 2


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
