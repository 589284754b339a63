"""What a run takes for a data set when nothing else is asked for, by the names of the settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hessianflow.interfaces import HessianFlowError

SIDES: Mapping[str, int] = {
    "digits": 8,
    "fake": 16,
    "cifar10": 32,
    "cifar100": 32,
    "svhn": 32,
    "tiny-imagenet": 64,
}
"""Pixels a side of the images of each data set; those of image files are cut to any size."""
BUNDLED = ("digits", "fake")
"""Data sets that need no files."""
FILE_SIDE = 224
"""Side that image files are cut to, unless resolutions say otherwise."""


@dataclass(frozen=True)
class Preset:
    """What a run takes for a data set when nothing else is asked for.

    Attributes:
        settings: values by the names of the settings.
        schedule: name of the learning-rate schedule.
        milestones: epochs after which that schedule lowers the rate, in a run of the usual epochs.
        methods: options of methods that are usual for the data set, by method.
    """

    settings: Mapping[str, Any]
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (30, 60, 80)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_SMALL_IMAGES: dict[str, Any] = {
    "model": "resnet20",
    "batch_size": 128,
    "max_batch_size": 16384,
    "epochs": 90,
    "lr": 0.1,
    "probe_examples": 64,
    "curvature_budget": 0.01,
    "precision": "auto",
    "channels_last": True,
}
_LARGER_IMAGES = {**_SMALL_IMAGES, "model": "resnet18"}
# CIFAR: the published ABSA settings for residual networks. Others: our choice.
PRESETS: Mapping[str, Preset] = {
    "digits": Preset(
        {
            "model": "digits-cnn",
            "batch_size": 32,
            "max_batch_size": 512,
            "epochs": 30,
            "lr": 0.05,
            "probe_examples": 128,
            "precision": "float32",
            "channels_last": False,
            "threads": 1,  # the network is too small to share
        },
        milestones=(20, 26),
        methods={"absa": {"patience": 5}, "abs": {"patience": 5}},
    ),
    "fake": Preset(
        {
            **_SMALL_IMAGES,
            "model": "c1",
            "curvature_budget": None,
            "precision": "float32",
            "max_batch_size": 512,
            "epochs": 4,
            "lr": 0.02,
        },
        milestones=(3,),
    ),
    "cifar10": Preset(_SMALL_IMAGES),
    "cifar100": Preset(_SMALL_IMAGES),
    "svhn": Preset(_SMALL_IMAGES),
    "tiny-imagenet": Preset(_LARGER_IMAGES),
    "imagenet": Preset({**_LARGER_IMAGES, "batch_size": 256}),
    "folder": Preset(_LARGER_IMAGES),
}


def preset_of(data: str) -> Preset:
    """Return the preset of a data set.

    Raises:
        HessianFlowError: an unknown data set; the error has the nearest name.
    """
    if data not in PRESETS:
        near = get_close_matches(data.lower(), PRESETS, n=1)
        hint = "".join(f" (did you mean {name}?)" for name in near)
        raise HessianFlowError(
            f"--data: unknown data set {data!r}{hint}; there are {', '.join(PRESETS)}"
        )
    return PRESETS[data]


ADAPTIVE = ("adam", "adamw", "lamb")
"""Optimizers that divide by the size of the gradients: their noise follows rate over the root of
the batch, so that a rate scales with the root (Malladi et al., arXiv:2205.10287)."""

RATES: Mapping[str, Mapping[str, float]] = {
    "adam": {"all": 1e-3},
    "adamw": {"all": 1e-3},
    "lars": {"digits": 1.0},
    "clars": {"digits": 0.1},
    "lamb": {"digits": 0.003},
}
"""Rates of optimizers other than SGD, whose rates the presets above have, by data set or for all.

Adam's is the default of Kingma and Ba, arXiv:1412.6980, section 2. Those on digits were measured:
30 epochs of `hessianflow train --optimizer NAME --lr RATE`, seeds 0 and 1 (lamb: 2 too), test
accuracy in %: adam and adamw 98.3 98.6; lars 98.3 98.1 at 0.3, 98.1 98.3 at 1, 98.6 98.1 at 3,
diverged at 10; clars 98.9 97.8 at 0.1 and at 0.3, diverged at 1; lamb 98.6 98.3 98.9 at 0.003, 99.4
97.8 98.9 at 0.01.
"""
