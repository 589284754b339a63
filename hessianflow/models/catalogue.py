"""Networks by name: :func:`create` builds one, :func:`names` lists those of this toolkit."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.models import external, resnet, small
from hessianflow.models.decoder import DECODERS, Decoder
from hessianflow.models.resnet import Shortcut
from hessianflow.models.squeezenext import CAFFE, PYTORCHCV, SqueezeNextShape, Style, squeezenext
from hessianflow.models.wide_resnet import wide_resnet

Variant = Literal["cifar", "imagenet"]

SMALL: Mapping[str, tuple[Callable[..., nn.Module], int]] = {
    "digits-cnn": (small.digits_cnn, 4),
    "c1": (small.c1, 4),
    "c2": (small.c2, 16),
}
"""Builders of the plain networks, each with the smallest input size that it accepts."""

_IN_CHANNELS = {"digits-cnn": 1}  # 3 for all others
CIFAR_RESNETS = (8, 14, 20, 32, 44, 56, 110)
IMAGENET_RESNETS = (18, 34, 50)
WIDE_RESNETS = ((16, 4), (28, 10))


def names() -> list[str]:
    """Return every name that :func:`create` knows by itself, sorted."""
    return sorted([*_builders("cifar", 32, "B"), *DECODERS])


def create(
    name: str,
    num_classes: int = 10,
    input_size: int = 32,
    variant: Variant = "cifar",
    *,
    in_channels: int | None = None,
    shortcut: Shortcut = "B",
) -> nn.Module:
    """Build the network called `name`, freshly initialised from torch's global generator.

    Args:
        name: One of :func:`names`; or "package.module:function", a function that returns a model
            and gets those of `num_classes`, `input_size` and `in_channels` that it names; or
            "timm/NAME", "torchvision/NAME" if those packages are installed.
        num_classes: Number of outputs of the last layer; for a decoder, the number of tokens.
        input_size: Height and width of the images; a decoder takes sequences of any length.
        variant: "cifar" for the stem made for small images, "imagenet" for the one that halves the
            image at once. Networks that exist in one form only refuse the other.
        in_channels: Channels of the images; None for 1 ("digits-cnn") or 3 (all others).
        shortcut: "A" (padding) or "B" (projection) of residual networks.

    Raises:
        HessianFlowError: The name is unknown (known ones are listed), or an argument out of range.
    """
    _check(num_classes, input_size, variant, in_channels, shortcut)
    channels = in_channels or _IN_CHANNELS.get(name, 3)
    if external.is_external(name):
        sizes = {"num_classes": num_classes, "input_size": input_size, "in_channels": channels}
        return external.build(name, **sizes)
    builders = _builders(variant, input_size, shortcut)
    if name in DECODERS:
        return Decoder(DECODERS[name], num_classes)
    if name in builders:
        return builders[name](num_classes=num_classes, in_channels=channels)
    known = names()
    if name in known:
        raise HessianFlowError(f"model {name!r} has no {variant!r} variant; use variant='cifar'")
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = "".join(f" (did you mean {other!r}?)" for other in near)
    raise HessianFlowError(f"unknown model {name!r}{hint}; known: {', '.join(known)}")


def _builders(
    variant: Variant, input_size: int, shortcut: Shortcut
) -> dict[str, Callable[..., nn.Module]]:
    """Return builders of all networks of a variant, which take num_classes and in_channels."""
    builders: dict[str, Callable[..., nn.Module]] = {
        f"resnet{depth}": partial(resnet.imagenet_resnet, depth, stem=variant, shortcut=shortcut)
        for depth in IMAGENET_RESNETS
    }
    styles: Mapping[Style, Mapping[str, SqueezeNextShape]]
    styles = {"caffe": CAFFE, "pytorchcv": PYTORCHCV}
    for style, shapes in styles.items():
        builders |= {
            name: partial(squeezenext, shape, style=style, variant=variant, input_size=input_size)
            for name, shape in shapes.items()
        }
    if variant == "cifar":
        builders |= {name: partial(_small, name, input_size=input_size) for name in SMALL}
        builders |= {
            f"resnet{depth}": partial(resnet.cifar_resnet, depth, shortcut=shortcut)
            for depth in CIFAR_RESNETS
        }
        builders |= {
            f"wrn-{depth}-{widen}": partial(wide_resnet, depth, widen)
            for depth, widen in WIDE_RESNETS
        }
    return builders


def _small(name: str, *, num_classes: int, input_size: int, in_channels: int) -> nn.Module:
    build, smallest = SMALL[name]
    if input_size < smallest:
        raise HessianFlowError(
            f"{name} needs images of at least {smallest} pixels a side, got input_size={input_size}"
        )
    return build(num_classes=num_classes, input_size=input_size, in_channels=in_channels)


def _check(
    num_classes: int, input_size: int, variant: str, in_channels: int | None, shortcut: str
) -> None:
    for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count is not None and count < 1:
            raise HessianFlowError(f"{name} must be at least 1, got {count}")
    if input_size < 1:
        raise HessianFlowError(f"input_size must be at least 1 pixel, got {input_size}")
    if variant == "imagenet" and input_size < 32:
        raise HessianFlowError(
            f"variant 'imagenet' needs images of 32 pixels or more, got {input_size}: use 'cifar'"
        )
    if variant not in get_args(Variant):
        raise HessianFlowError(f"variant must be 'cifar' or 'imagenet', got {variant!r}")
    if shortcut not in get_args(Shortcut):
        raise HessianFlowError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
