"""What a run takes for a data set when nothing else is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hessianflow.data.text import BLOCK_LENGTH


@dataclass(frozen=True)
class Preset:
    """What a run takes for a data set when nothing else is asked for.

    Attributes:
        settings: values by the names of the settings.
        schedule: name of the learning-rate schedule.
        milestones: epochs after which that schedule lowers the rate, in a run of the usual epochs.
        methods: options of methods that are usual for the data set, by method.
        optimizer, adversary: names of those methods.
    """

    settings: Mapping[str, Any]
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (30, 60, 80)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizer: str = "sgd"
    adversary: str = "fgsm"

    @property
    def usual_methods(self) -> dict[str, str]:
        """Return the names of the methods by the settings that choose them."""
        names = ("optimizer", "schedule", "adversary")
        return {name: getattr(self, name) for name in names}


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
"""The published ABSA settings for residual networks on CIFAR; our choice for other images."""
TEXT = Preset(
    {
        "model": "gpt-tiny",
        "batch_size": 16,
        "max_batch_size": 512,
        "epochs": 4,
        "lr": 0.3,
        "block_length": BLOCK_LENGTH,
        "probe_examples": 16,
        "curvature_budget": 0.01,
        "precision": "auto",
        "channels_last": False,
    },
    schedule="cosine",
    milestones=(2, 3),
    optimizer="adamw",
    adversary="none",
)
"""Settings for a small language model. They are our choice."""
LARGER_IMAGES: Mapping[str, Any] = {**SMALL_IMAGES, "model": "resnet18"}
