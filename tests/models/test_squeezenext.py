"""SqueezeNext against the published layer tables: parameters, multiply-adds, order of the
convolutions."""

import pytest
import torch
from peers import library
from torch import nn

from hessianflow import models
from hessianflow.interfaces import HessianFlowError
from hessianflow.models.squeezenext import SqueezeNextBlock, SqueezeNextShape


def weights_and_norms(module: nn.Module) -> tuple[int, int]:
    """Numbers in convolutions and linear layers, and in batch normalisations."""
    norms = sum(
        p.numel() for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    return models.count_parameters(module) - norms, norms


def blocks_of(model: nn.Module) -> list[SqueezeNextBlock]:
    return [module for module in model.modules() if isinstance(module, SqueezeNextBlock)]


@pytest.mark.parametrize(
    ("name", "conv_and_linear", "norm"),
    [
        ("1.0-23", 706_728, 11_552),
        ("1.0-g-23", 532_520, 11_552),
        ("1.0-23v5", 916_648, 14_368),
        ("2.0-23", 2_340_008, 22_720),
        ("2.0-23v5", 3_195_560, 28_352),
        ("1.0-34", 1_036_200, 17_360),
        ("1.0-44", 1_218_216, 21_760),
        ("2.0-44", 4_385_960, 43_136),
    ],
)
def test_imagenet_parameters(name: str, conv_and_linear: int, norm: int) -> None:
    model = models.create(f"squeezenext-{name}", 1000, 227, "imagenet")
    assert weights_and_norms(model) == (conv_and_linear, norm)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("1.0-23", 724_056),
        ("1.0-23v5", 921_816),
        ("1.5-23", 1_511_824),
        ("1.5-23v5", 1_953_616),
        ("2.0-23", 2_583_752),
        ("2.0-23v5", 3_366_344),
    ],
)
def test_imagenet_parameters_of_the_pytorchcv_style(name: str, total: int) -> None:
    model = models.create(f"squeezenext-{name}@pytorchcv", 1000, 224, "imagenet")
    assert models.count_parameters(model) == total


@pytest.mark.parametrize(
    ("name", "num_classes", "total"),
    [
        ("1.0-23", 10, 582_890),
        ("1.0-23@pytorchcv", 10, 588_666),
        ("1.0-23v5", 10, 779_242),
        ("1.0-23v5@pytorchcv", 10, 786_426),
        ("2.0-23", 10, 2_302_410),
        ("2.0-23@pytorchcv", 10, 2_313_962),
        ("1.0-23", 100, 594_500),
        ("1.0-23@pytorchcv", 100, 600_276),
    ],
)
def test_cifar_parameters(name: str, num_classes: int, total: int) -> None:
    assert models.count_parameters(models.create(f"squeezenext-{name}", num_classes)) == total


@pytest.mark.parametrize(
    ("name", "millions_227", "millions_224"),
    [
        ("1.0-23", 278.0, 269.0),
        ("1.0-g-23", 224.2, 216.8),
        ("1.0-23v5", 224.9, 222.0),
        ("2.0-23", 742.1, 719.1),
        ("2.0-23v5", 702.6, 698.0),
    ],
)
def test_multiply_adds(name: str, millions_227: float, millions_224: float) -> None:
    """Published to one decimal of a million, classifier included."""
    model = models.create(f"squeezenext-{name}", 1000, 227, "imagenet")
    counts = [models.count_multiply_adds(model, (3, size, size)) for size in (227, 224)]
    assert [round(count / 1e6, 1) for count in counts] == [millions_227, millions_224]


@pytest.mark.parametrize(
    ("block", "weights", "norm"),
    [
        (SqueezeNextBlock(64, 32, project=True), 1024 + 128 + 384 + 768 + 512 + 2048, 240),
        (SqueezeNextBlock(32, 32), 512 + 128 + 384 + 768 + 512, 176),
        (SqueezeNextBlock(32, 32, groups=2), 256 + 128 + 192 + 384 + 512, 176),
        (SqueezeNextBlock(64, 32, project=True, reads_shortcut=True), 4352, 240),
    ],
    ids=["projection", "identity", "grouped", "v5 projection"],
)
def test_block_sizes_worked_by_hand(block: SqueezeNextBlock, weights: int, norm: int) -> None:
    assert weights_and_norms(block) == (weights, norm)


def test_layers_of_the_23_network() -> None:
    """111 convolutions and 21 additions; stem 9408, tail 32768, classifier 129000 weights."""
    model = models.create("squeezenext-1.0-23", 1000, 227, "imagenet")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (len(convolutions), len(blocks_of(model))) == (111, 21)
    assert [convolutions[i].weight.numel() for i in (0, -1)] == [9408, 32768]
    assert models.count_parameters(model[-1]) == 129_000
    v5 = models.create("squeezenext-1.0-23v5", 1000, 227, "imagenet")
    assert next(v5.parameters()).numel() == 4800


@pytest.mark.parametrize(
    ("name", "vertical_first"), [("1.0-23", [True, False]), ("1.0-23@pytorchcv", [False, False])]
)
def test_order_of_the_separable_pair(name: str, vertical_first: list[bool]) -> None:
    blocks = blocks_of(models.create(f"squeezenext-{name}"))
    kernels = [
        [m.kernel_size for m in b.body.modules() if isinstance(m, nn.Conv2d)][2:4] for b in blocks
    ]
    expected = [
        [(3, 1), (1, 3)] if vertical_first[i % 2] else [(1, 3), (3, 1)] for i in range(len(blocks))
    ]
    assert kernels == expected


def test_block_applies_relu_after_the_expansion_and_after_the_addition() -> None:
    """Oracle: the five convolutions of an identity block written out, with fresh normalisation in
    eval mode."""
    block = SqueezeNextBlock(8, 8).double().eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    out = x
    for conv in (m for m in block.body.modules() if isinstance(m, nn.Conv2d)):
        k = conv.kernel_size
        out = nn.functional.conv2d(out, conv.weight, padding=(k[0] // 2, k[1] // 2))
        out = (out / (1 + 1e-5) ** 0.5).clamp(min=0)
    torch.testing.assert_close(block(x), (out + x).clamp(min=0), rtol=1e-12, atol=1e-12)


def test_sizes_of_the_feature_maps_at_227_pixels() -> None:
    """111 -> 55 after the pooling of the 7x7 stem; 112 -> 56 needs a pooling that rounds up."""
    for name, sides in (("squeezenext-1.0-23", (111, 55)), ("squeezenext-1.0-23v5", (112, 56))):
        model = models.create(name, 1000, 227, "imagenet").eval()
        stem = model[0](torch.zeros(1, 3, 227, 227))
        assert (stem.shape[-1], model[1](stem).shape[-1]) == sides


def test_cifar_stem_halves_larger_images() -> None:
    for size, side in ((32, 32), (64, 32)):
        assert (
            models.create("squeezenext-1.0-23", input_size=size)[0](
                torch.zeros(2, 3, size, size)
            ).shape[-1]
            == side
        )


@pytest.mark.parametrize(("multiplier", "groups"), [(0.3, 1), (0.125, 2), (0.0, 1)])
def test_impossible_multipliers_are_refused(multiplier: float, groups: int) -> None:
    with pytest.raises(
        HessianFlowError,
        match=f"multiplier must make .* multiple of groups={groups}, got {multiplier}",
    ):
        SqueezeNextShape(multiplier=multiplier, groups=groups)


def test_counting_leaves_the_model_as_found() -> None:
    model = models.create("squeezenext-1.0-23").train()
    model[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    models.count_multiply_adds(model, (3, 32, 32))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (model.training, model[0].training) == (True, False)
    assert not any(module._forward_hooks for module in model.modules())


def test_counting_restores_the_model_when_the_pass_fails() -> None:
    model = models.create("resnet20")
    with pytest.raises(RuntimeError, match="channels"):
        models.count_multiply_adds(model, (5, 32, 32))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "other"), [("1.0-23", "sqnxt23_w1"), ("1.0-23v5", "sqnxt23v5_w1")]
)
def test_pytorchcv_style_computes_what_that_library_computes(name: str, other: str) -> None:
    """The library itself as oracle: the same weights, layer by layer in the order they run, give
    the same outputs."""
    peer = library("pytorchcv.models.squeezenext")
    ours = models.create(f"squeezenext-{name}@pytorchcv", 1000, 224, "imagenet").eval()
    theirs = getattr(peer, other)().eval()
    images = torch.randn(2, 3, 224, 224)

    def layers_in_order(model: nn.Module) -> list[nn.Module]:
        order: list[nn.Module] = []
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        layers = [module for module in model.modules() if isinstance(module, kinds)]
        hooks = [
            layer.register_forward_hook(lambda layer, *_: order.append(layer)) for layer in layers
        ]
        model(images[:1])
        for hook in hooks:
            hook.remove()
        return order

    for mine, its in zip(layers_in_order(ours), layers_in_order(theirs), strict=True):
        mine.load_state_dict(its.state_dict())
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(
            ours(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
