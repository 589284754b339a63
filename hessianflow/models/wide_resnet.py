"""Wide residual networks (Zagoruyko and Komodakis, 2016, arXiv:1605.07146).

The networks have depth 6n+4, widths 16, 32, 64 times k, and n blocks per stage, each
BN-ReLU-conv3x3-BN-ReLU-conv3x3, without dropout. Where the width or the resolution changes, the
shortcut is a 1x1 convolution of the activated input. Convolutions start from
N(0, sqrt(2 / (k^2 * out_channels))).
"""

from torch import Tensor, nn
from torch.nn.functional import relu

from hessianflow.models.resnet import init_convolutions


class PreactivationBlock(nn.Module):
    """The block x + conv(relu(bn(conv(relu(bn(x)))))); the first x may be conv1x1(relu(bn(x)))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.project: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H/stride, W/stride]."""
        active = relu(self.norm1(inputs))
        shortcut = inputs
        if self.project is not None:
            shortcut = self.project(active)
        body: Tensor = self.conv2(relu(self.norm2(self.conv1(active))))
        return body + shortcut


def wide_resnet(
    depth: int, widen: int, num_classes: int = 10, in_channels: int = 3
) -> nn.Sequential:
    """Build WRN-depth-widen for small images: [N, in_channels, H, W] to [N, num_classes].

    WRN-16-4 has 2,748,890 parameters (10 classes), WRN-28-10 has 36,536,884 (100 classes).
    """
    blocks: list[nn.Module] = []
    channels = 16
    stride = 1  # of the next block; every stage but the first begins with 2
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            blocks.append(PreactivationBlock(channels, width, stride))
            channels = width
            stride = 1
        stride = 2
    stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    head = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(stem, *blocks, *head, nn.Linear(channels, num_classes))
    init_convolutions(model)
    return model
