"""The cells of the study: SqueezeNext on CIFAR-10, CIFAR-100 and SVHN."""

from collections.abc import Mapping, Sequence

from experiments import large_batch
from experiments.absa_cifar.grid import CIFAR10, CIFAR100, SMOKE
from experiments.large_batch import MAIN, METHODS, PUBLISHED, Settings, shortened
from experiments.runner import Cell, Scale

_NET: Settings = {"model": "squeezenext-1.0-23"}
_FASTEST: Settings = {"model": "squeezenext-1.0-23v5"}
WHOLE: Mapping[str, Settings] = {
    "cifar10": {**CIFAR10, **_NET},
    "cifar100": {**CIFAR100, **_NET},
    "svhn": {**PUBLISHED, **_NET, "data": "svhn", "augment": False},
}
SMALL: Settings = {
    **shortened(CIFAR10, 5),
    **_FASTEST,
    "train_examples": 5_000,
    "test_examples": 2_000,
    "max_batch_size": 1024,
    "microbatch_size": 128,
    "probe_examples": 32,
}
"""A tenth of the images, a fifth of epochs, milestones and patience, and about a tenth of the
batches."""
_TINY: Settings = {"train_examples": 64, "max_batch_size": 64, "epochs": 3, "probe_examples": 8}


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, in the order of usefulness.

    smoke: the main three once on made-up data.
    cpu: a tenth of CIFAR-10, the network that is fastest on a processor, up to batch 1024.
    gpu: all of CIFAR-10, up to batches 2048 and 16384.
    full: CIFAR-10, CIFAR-100 and SVHN, up to batches 512, 2048, 8192 and 16384.
    """
    if scale == "smoke":
        return large_batch.cells({"fake": {**SMOKE, **_FASTEST, **_TINY}}, [], [0], MAIN)
    if scale == "cpu":
        return large_batch.cells({"cifar10-tenth": SMALL}, [], seeds, METHODS)
    if scale == "gpu":
        return large_batch.cells({"cifar10": WHOLE["cifar10"]}, [2048, 16_384], seeds, METHODS)
    return large_batch.cells(WHOLE, [512, 2048, 8192, 16_384], seeds, METHODS)
