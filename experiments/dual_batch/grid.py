"""The cells of the dual-batch study: how many workers take the small batch, how much time they may,
which resolutions.

The cluster is the published one (four GTX 1080, CIFAR, resolutions 24 and 32, arXiv:2509.26092 and
its code), scaled to a fifth: examples an epoch, large batches and the intercept of the time model
are divided by 5. Every plan is then the published one with all batches and shares, and all
predicted seconds, divided by 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.runner import Cell, Scale

Settings = dict[str, Any]
SCALE = 5
"""50,000 published examples to our 10,000."""
RESOLUTIONS, LARGE_BATCHES = (24, 32), (600, 560)
SLOPES, INTERCEPTS = (3.5268e-4, 5.05636e-4), (0.0147888, 0.0155621)
"""Of the published CIFAR runs, by resolution."""
WORKERS = 4
PLANS = (
    ((0, 1.05), (3, 1.05)),
    ((2, 1.05), (3, 1.1)),
    ((2, 1.1), (4, 1.05), (1, 1.05), (4, 1.1), (1, 1.1)),
)
"""Small workers and extra time, in groups, the most telling first; without small workers the time
plays no role."""

_CIFAR: Settings = {
    "data": "cifar10",
    "train_examples": 10_000,
    "test_examples": 5_000,
    "model": "resnet8",
    "batch_size": LARGE_BATCHES[1] // SCALE,
    "max_batch_size": 2048,
    "epochs": 8,
    "lr": 0.1,
    "schedule": {"name": "multistep", "milestones": [4, 6], "lr_decay": 0.1},
    "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
    "augment": False,
    "precision": "float32",
    "channels_last": True,
}
_FAKE: Settings = {
    "data": "fake",
    "train_examples": 512,
    "test_examples": 64,
    "model": "resnet8",
    "batch_size": 32,
    "epochs": 4,
    "lr": 0.02,
    "schedule": {"name": "multistep", "milestones": [2]},
    "precision": "float32",
}


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, group by group of plans, and seed by seed within.

    smoke: two plans, with and without resolutions, on made-up data. cpu: all plans on 10,000 images
    of CIFAR-10, ResNet-8, 8 epochs. gpu, full: the published setting on all of CIFAR-100:
    ResNet-18, 140 epochs, published batches and times.
    """
    if scale == "smoke":
        return [
            _cell("fake", _FAKE, cyclic, 0, small, 1.05)
            for cyclic in (False, True)
            for small in (0, 3)
        ]
    name, base = (
        ("cifar10-resnet8", _CIFAR) if scale == "cpu" else ("cifar100-resnet18", published())
    )
    ordered = [(seed, plan) for group in PLANS for seed in seeds for plan in group]
    return [
        _cell(name, base, cyclic, seed, *plan) for seed, plan in ordered for cyclic in (False, True)
    ]


def published() -> Settings:
    """CIFAR-100 as published; augmentation as here (crops and flips for shifts, rotation and
    zoom)."""
    changed = {
        "data": "cifar100",
        "model": "resnet18",
        "epochs": 140,
        "lr": 0.2,
        "schedule": {**_CIFAR["schedule"], "milestones": [80, 120]},
    }
    kept = {
        name: value
        for name, value in _CIFAR.items()
        if name not in ("train_examples", "test_examples")
    }
    return {**kept, **changed, "batch_size": LARGE_BATCHES[1], "augment": True, "precision": "bf16"}


def method(small: int, extra_time: float) -> str:
    """The name of a plan; without small workers the extra time plays no role."""
    return f"s{small}" if small == 0 else f"s{small}-k{extra_time:g}"


def _cell(
    problem: str, base: Settings, cyclic: bool, seed: int, small: int, extra_time: float
) -> Cell:
    scale = base["batch_size"] / LARGE_BATCHES[1]
    times: Mapping[bool, Settings] = {
        False: {"slope": SLOPES[1], "intercept": INTERCEPTS[1] * scale},
        True: {
            "slope": list(SLOPES),
            "intercept": [intercept * scale for intercept in INTERCEPTS],
        },
    }
    resolution: Mapping[bool, Settings] = {
        False: {},
        True: {
            "resolution": "cyclic",
            "resolution_batch_sizes": [round(batch * scale) for batch in LARGE_BATCHES],
        },
    }
    controller = {
        "name": "dual-batch",
        "workers": WORKERS,
        "small_workers": small,
        "extra_time": extra_time,
        **times[cyclic],
    }
    common = {"adversary": "none", "curvature": "off", "plots": False, "threads": 1}
    settings = {**common, **base, "controller": controller, **resolution[cyclic]}
    return Cell(
        f"{problem}-{'cyclic' if cyclic else 'fixed'}", method(small, extra_time), seed, settings
    )
