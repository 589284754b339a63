"""What a run takes for a data set when nothing else is asked for, by the names of the settings."""

from collections.abc import Mapping
from typing import Any

_SMALL_IMAGES: dict[str, Any] = {
    "model": "resnet20",
    "batch_size": 128,
    "max_batch_size": 16384,
    "epochs": 90,
    "lr": 0.1,
    "schedule": "multistep",
    "milestones": (30, 60, 80),
    "patience": 10,
    "probe_examples": 64,
    "curvature_budget": 0.01,
    "precision": "auto",
    "channels_last": True,
}
# CIFAR: the published ABSA settings for residual networks. Others: ours.
PRESETS: Mapping[str, dict[str, Any]] = {
    "digits": {
        "model": "digits-cnn",
        "batch_size": 32,
        "max_batch_size": 512,
        "epochs": 30,
        "lr": 0.05,
        "schedule": "multistep",
        "milestones": (20, 26),
        "patience": 5,
        "probe_examples": 128,
        "precision": "float32",
        "channels_last": False,
        "threads": 1,  # the network is too small to share
    },
    "fake": {
        **_SMALL_IMAGES,
        "model": "c1",
        "curvature_budget": None,
        "precision": "float32",
        "max_batch_size": 512,
        "epochs": 4,
        "lr": 0.02,
        "milestones": (3,),
    },
    "cifar10": _SMALL_IMAGES,
    "cifar100": _SMALL_IMAGES,
    "svhn": _SMALL_IMAGES,
    "tiny-imagenet": {**_SMALL_IMAGES, "model": "resnet18"},
    "imagenet": {**_SMALL_IMAGES, "model": "resnet18", "batch_size": 256},
    "folder": {**_SMALL_IMAGES, "model": "resnet18"},
}

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
