"""What a run takes for a data set when nothing else is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


SMALL_IMAGES: Mapping[str, Any] = {
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
"""The published ABSA settings for residual networks on CIFAR; for other images they are our
choice."""
LARGER_IMAGES: Mapping[str, Any] = {**SMALL_IMAGES, "model": "resnet18"}
