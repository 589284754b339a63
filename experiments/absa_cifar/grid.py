"""The cells of the study: networks of the ABSA paper and its code, on CIFAR."""

from collections.abc import Mapping, Sequence

from experiments import large_batch
from experiments.large_batch import MAIN, METHODS, PUBLISHED, Settings, shortened
from experiments.runner import Cell, Scale


def _steps(*milestones: int) -> Settings:
    """The published schedule with other milestones."""
    return {**PUBLISHED["schedule"], "milestones": list(milestones)}


CIFAR10: Settings = {**PUBLISHED, "data": "cifar10", "augment": False}
CIFAR100: Settings = {**PUBLISHED, "data": "cifar100", "augment": True}
"""Augmented as in the published code: CIFAR-10 is not, CIFAR-100 is."""
_C1: Settings = {"model": "c1", "lr": 0.02, "schedule": _steps(30, 60)}

WHOLE: Mapping[str, Settings] = {
    "cifar10-resnet20": {**CIFAR10, "model": "resnet20"},
    "cifar10-resnet18": {**CIFAR10, "model": "resnet18"},
    "cifar10-c1": {**CIFAR10, **_C1},
    "cifar10-wrn-16-4": {**CIFAR10, "model": "wrn-16-4"},
    "cifar100-resnet20": {**CIFAR100, "model": "resnet20"},
    "cifar100-wrn-16-4": {**CIFAR100, "model": "wrn-16-4"},
}
FIFTH: Settings = {
    **shortened(CIFAR10, 5),
    "train_examples": 10_000,
    "test_examples": 5_000,
    "max_batch_size": 2048,
    "microbatch_size": 128,
    "probe_examples": 64,
}
"""A fifth of the images, epochs, milestones and patience, and about a fifth of the batches."""
SMOKE: Settings = {
    **PUBLISHED,
    "data": "fake",
    "model": "resnet8",
    "train_examples": 256,
    "test_examples": 64,
    "batch_size": 32,
    "max_batch_size": 128,
    "epochs": 4,
    "lr": 0.02,
    "schedule": _steps(2),
    "microbatch_size": 32,
    "norm_batch_size": 32,
    "probe_examples": 32,
    "precision": "float32",
}


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, in the order of usefulness.

    smoke: the main three once on made-up data.
    cpu: a fifth of CIFAR-10, ResNet-20, up to batch 2048.
    gpu: all of CIFAR-10, ResNet-20, up to batches 2048 and 16384.
    full: every network, up to batches 512, 2048, 8192 and 16384.
    """
    if scale == "smoke":
        return large_batch.cells({"fake": SMOKE}, [], [0], MAIN)
    if scale == "cpu":
        return large_batch.cells(
            {"cifar10-resnet20-fifth": {**FIFTH, "model": "resnet20"}}, [], seeds, METHODS
        )
    if scale == "gpu":
        return large_batch.cells(
            {"cifar10-resnet20": WHOLE["cifar10-resnet20"]}, [2048, 16_384], seeds, METHODS
        )
    return large_batch.cells(WHOLE, [512, 2048, 8192, 16_384], seeds, METHODS)
