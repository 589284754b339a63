"""Every network by name: published parameter counts, shapes, gradients, and the answers to bad
input."""

import pytest
import torch
from torch import nn

from hessianflow import models
from hessianflow.interfaces import HessianFlowError

CIFAR_MODELS = [name for name in models.names() if "@" not in name]
QUICK_MODELS = [
    name
    for name in CIFAR_MODELS
    if name not in {"wrn-28-10", "resnet110", "resnet50", "squeezenext-2.0-44"}
    and not name.startswith("gpt-")  # these take text: tests/models/test_decoder.py
]


def input_for(name: str, size: int = 32) -> torch.Tensor:
    return torch.randn(2, 1 if name == "digits-cnn" else 3, size, size)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("c1", {}, 1_756_682),
        ("c2", {}, 1_148_746),
        ("resnet20", {}, 272_474),
        ("resnet20", {"num_classes": 100}, 278_324),
        ("resnet20", {"shortcut": "A"}, 269_722),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"num_classes": 100}, 11_220_132),
        ("resnet18", {"num_classes": 200}, 11_271_432),
        ("resnet18", {"num_classes": 1000, "variant": "imagenet", "input_size": 224}, 11_689_512),
        ("wrn-16-4", {}, 2_748_890),
        ("wrn-16-4", {"num_classes": 100}, 2_772_020),
        ("wrn-28-10", {"num_classes": 100}, 36_536_884),
    ],
)
def test_published_parameter_counts(name: str, options: dict[str, object], expected: int) -> None:
    assert models.count_parameters(models.create(name, **options)) == expected  # type: ignore[arg-type]


def test_resnet50_has_the_parameters_of_its_layer_table() -> None:
    """Counted from the table of He et al. (2015): stem, 16 bottlenecks, 4 projections,
    classifier."""
    total, channels = 3 * 64 * 49 + 2 * 64, 64
    for depth, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        total += channels * 4 * width + 8 * width  # projection with its normalisation
        for _ in range(depth):
            total += (
                channels * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
            )
            channels = 4 * width
    total += channels * 1000 + 1000
    assert models.count_parameters(models.create("resnet50", 1000, 224, "imagenet")) == total


def test_depth_44_uses_bottlenecks_of_three_convolutions() -> None:
    model = models.create("resnet44")
    blocks = [module for module in model.modules() if type(module).__name__ == "ResidualBlock"]
    assert len(blocks) == 3 * 7
    assert all(sum(isinstance(m, nn.Conv2d) for m in block.body.modules()) == 3 for block in blocks)


def test_digits_cnn_is_small() -> None:
    assert models.count_parameters(models.create("digits-cnn", input_size=8)) == 30_762


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_MODELS)
def test_forward_shape_and_a_gradient_for_every_parameter(name: str) -> None:
    model = models.create(name, num_classes=7)
    outputs = model(input_for(name))
    assert outputs.shape == (2, 7)
    gradients = torch.autograd.grad(outputs.square().sum(), list(model.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_imagenet_variants_take_32_pixels() -> None:
    for name in (
        "resnet18",
        "squeezenext-1.0-23",
        "squeezenext-1.0-23v5",
        "squeezenext-1.0-23@pytorchcv",
    ):
        assert models.create(name, 5, 32, "imagenet").eval()(torch.randn(1, 3, 32, 32)).shape == (
            1,
            5,
        )


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenext-1.0-23", "squeezenext-1.0-23v5", "squeezenext-1.0-g-23"]
)
def test_imagenet_variant_takes_images_of_224_pixels(name: str) -> None:
    model = models.create(name, 1000, 224, "imagenet").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["digits-cnn", "c1", "resnet20", "wrn-16-4", "squeezenext-1.0-23"])
def test_the_global_seed_at_creation_fixes_the_weights(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(models.create(name).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", ["c1", "c2", "digits-cnn"])
@pytest.mark.parametrize("size", [17, 28, 33])
def test_plain_networks_follow_the_input_size(name: str, size: int) -> None:
    model = models.create(name, input_size=size, in_channels=2)
    assert model(torch.randn(2, 2, size, size)).shape == (2, 10)


def test_residual_block_ends_with_relu_of_the_sum() -> None:
    """Oracle: two convolutions and the shortcut written out; normalisation is fresh and in eval
    mode."""
    block = models.create("resnet8").double().eval()[2]
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    first, second = (m for m in block.body.modules() if isinstance(m, nn.Conv2d))
    scale = (1 + 1e-5) ** -0.5
    inner = (nn.functional.conv2d(x, first.weight, padding=1) * scale).clamp(min=0)
    outer = nn.functional.conv2d(inner, second.weight, padding=1) * scale
    torch.testing.assert_close(block(x), (outer + x).clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-4"])
def test_convolutions_start_with_the_fan_out_deviation(name: str) -> None:
    """sqrt(2 / (k^2 out)) within 5 standard errors, std / sqrt(2n), of every convolution."""
    torch.manual_seed(0)
    for conv in (m for m in models.create(name).modules() if isinstance(m, nn.Conv2d)):
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert abs(conv.weight.std().item() / expected - 1) < 5 / (2 * conv.weight.numel()) ** 0.5


def test_option_a_subsamples_and_pads_with_zeros() -> None:
    from hessianflow.models.resnet import PaddedShortcut

    inputs = torch.arange(2 * 4 * 4, dtype=torch.float64).view(1, 2, 4, 4)
    outputs = PaddedShortcut(2, stride=2)(inputs)
    expected = torch.tensor(
        [[[0.0, 0], [0, 0]], [[0, 2], [8, 10]], [[16, 18], [24, 26]], [[0, 0], [0, 0]]]
    )
    assert torch.equal(outputs, expected.double()[None])


def test_projected_shortcut_of_a_wide_block_reads_the_activated_input() -> None:
    """Oracle: the block written out with tensor operations, batch statistics included."""
    from hessianflow.models.wide_resnet import PreactivationBlock

    block = PreactivationBlock(2, 3, stride=2).double().train()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)

    def normalised(t: torch.Tensor) -> torch.Tensor:
        mean = t.mean((0, 2, 3), keepdim=True)
        return (t - mean) / (t.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    active = normalised(x).clamp(min=0)
    inner = nn.functional.conv2d(active, block.conv1.weight, stride=2, padding=1)
    body = nn.functional.conv2d(normalised(inner).clamp(min=0), block.conv2.weight, padding=1)
    shortcut = torch.einsum(
        "oi,nihw->nohw", block.project.weight[:, :, 0, 0], active[:, :, ::2, ::2]
    )  # type: ignore[union-attr,index]
    torch.testing.assert_close(block(x), body + shortcut, rtol=1e-10, atol=1e-10)


def test_digits_cnn_learns_the_digits_quickly() -> None:
    from hessianflow import data

    torch.manual_seed(0)
    train, test = (data.load("digits", split=split) for split in ("train", "test"))  # type: ignore[arg-type]
    scaling = {"value_scale": train.value_scale, "mean": train.mean, "std": train.std}
    model = models.create("digits-cnn", input_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches = data.DeviceBatches(train.images, train.targets, 32, **scaling)  # type: ignore[arg-type]
    for _ in range(6):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    held_out = data.DeviceBatches(test.images, test.targets, 512, shuffle=False, **scaling)  # type: ignore[arg-type]
    inputs, targets = next(iter(held_out))
    assert (model.eval()(inputs).argmax(1) == targets).double().mean() >= 0.97


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("resnet21",),
            {},
            (
                r"unknown model 'resnet21' \(did you mean 'resnet2?0?1?.*'\?\); known: c1, c2,"
                r" digits-cnn"
            ),
        ),
        (("zzz",), {}, "unknown model 'zzz'; known: c1"),
        (
            ("resnet20", 10, 224, "imagenet"),
            {},
            "model 'resnet20' has no 'imagenet' variant; use variant='cifar'",
        ),
        (("resnet20", 0), {}, "num_classes must be at least 1, got 0"),
        (("resnet20", 10, 0), {}, "input_size must be at least 1 pixel, got 0"),
        (("resnet20", 10, 32, "tiny"), {}, "variant must be 'cifar' or 'imagenet', got 'tiny'"),
        (
            ("resnet18", 10, 28, "imagenet"),
            {},
            "variant 'imagenet' needs images of 32 pixels or more, got 28: use 'cifar'",
        ),
        (("resnet20",), {"in_channels": 0}, "in_channels must be at least 1, got 0"),
        (("resnet20",), {"shortcut": "C"}, "shortcut must be 'A' or 'B', got 'C'"),
        (("c2", 10, 8), {}, "c2 needs images of at least 16 pixels a side, got input_size=8"),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(HessianFlowError, match=message) as caught:
        models.create(*arguments, **options)
    assert "\n" not in str(caught.value)
