"""The cells of the language study: a decoder on Python's source files, at an equal number of bytes.

All methods make three passes over 393 kB, 1.2 million bytes in all. The learning rates of the small
batch come from the grids TUNING, in runs of a sixth of the length with another seed. The rates of
larger batches grow with the square root of the batch size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.large_batch import NO_LIMIT
from experiments.runner import Cell, Scale

Settings = dict[str, Any]

SMALL_BATCH = 16
"""Blocks in the small batch; they hold 1024 bytes."""
BASE: Settings = {
    "data": "python",
    "train_examples": 6144,
    "test_examples": 1024,
    "block_length": 64,
    "model": "gpt-tiny",
    "batch_size": SMALL_BATCH,
    "max_batch_size": SMALL_BATCH,
    "epochs": 3,
    "warmup_epochs": 0.1,
    "schedule": "cosine",
    "precision": "float32",
    "microbatch_size": 64,
}
SMOKE: Settings = {
    **BASE,
    "train_examples": 256,
    "test_examples": 16,
    "block_length": 16,
    "batch_size": 4,
    "max_batch_size": 4,
    "epochs": 2,
    "microbatch_size": 4,
}
LARGER: Settings = {
    **BASE,
    "train_examples": 65_536,
    "block_length": 256,
    "model": "gpt-mini",
    "epochs": 4,
    "precision": "auto",
}
"""Settings for a GPU, with 16.8 million bytes per pass. Not measured yet."""

ADAMW_RATE = 0.004
MUON_RATE = 0.48
"""Rate of the small batch from TUNING, as ADAMW_RATE is. Twice this rate was 0.01 nats better, but
it is the largest of the grid, and short runs favour large rates."""
TUNING: Mapping[str, tuple[float, ...]] = {
    "adamw": (0.004, 0.008, 0.002),
    "muon": (0.48, 0.24, 0.96),
}
TUNING_SEED = 2
PARTS: Settings = {"epoch_parts": 12}
"""Settings for controllers that decide at the end of an epoch."""
MEASURED: Settings = {
    **PARTS,
    "curvature": "epoch",
    "curvature_budget": NO_LIMIT,
    "probe_examples": 32,
}
"""Settings for curves of the curvature, which is read after every part without a budget."""
MUON: Settings = {"name": "muon", "rest": "adamw"}


def _at(optimizer: Any, rate: float, times: int, most: int = 0) -> Callable[[Settings], Settings]:
    """Return what sets an optimizer and `times` the small batch, which may grow to `most` times."""
    return lambda base: {
        "optimizer": optimizer,
        "batch_size": times * base["batch_size"],
        "max_batch_size": max(times, most) * base["batch_size"],
        "lr": rate * math.sqrt(times),
    }


def _adamw(times: int, most: int = 0, **changes: Any) -> Callable[[Settings], Settings]:
    return lambda base: {**_at("adamw", ADAMW_RATE, times, most)(base), **changes}


def _muon(times: int, most: int = 0, **changes: Any) -> Callable[[Settings], Settings]:
    return lambda base: {**_at(MUON, MUON_RATE, times, most)(base), **changes}


def _compared(controller: str) -> Settings:
    """Return the settings of a controller that compares the gradients of microbatches."""
    return {"controller": controller, "microbatch_size": SMALL_BATCH // 4}


METHODS: Mapping[str, Callable[[Settings], Settings]] = {
    "adamw-1x": _adamw(1),
    "adamw-4x": _adamw(4),
    "muon-8x": _muon(8),
    "muon-6x": _muon(6),
    "adamw-seesaw": _adamw(1, 16, controller="seesaw"),
    "muon-16x": _muon(16),
    "muon-seesaw": _muon(4, 32, controller="seesaw"),
    "adamw-8x": _adamw(8),
    "muon-1x": _muon(1),
    "adamw-16x": _adamw(16),
    "adamw-critical": _adamw(1, 16, controller="critical", **PARTS),
    "muon-critical": _muon(4, 32, controller="critical", **PARTS),
    "adamw-norm-test": _adamw(1, 16, **_compared("norm-test")),
    "adamw-noise-scale": _adamw(1, 16, **_compared("noise-scale"), **PARTS),
    "adamw-1x-measured": _adamw(1, **MEASURED),
    "muon-8x-measured": _muon(8, **MEASURED),
}
"""What each method changes in the settings of a problem, with the most useful methods first."""


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """Return the grid: first the tuning of the rates, then all methods, seed by seed.

    The scale "smoke" runs a fixed and a growing batch in seconds; "gpu" and "full" take a larger
    decoder and more text.
    """
    if scale == "smoke":
        return [cell("smoke", SMOKE, method, 0) for method in ("adamw-1x", "muon-seesaw")]
    if scale != "cpu":
        return [cell("larger", LARGER, method, seed) for seed in seeds for method in METHODS]
    found = [
        _tuning(name, optimizer, rate)
        for name, optimizer in (("adamw", "adamw"), ("muon", MUON))
        for rate in TUNING[name]
    ]
    return found + [cell("python", BASE, method, seed) for seed in seeds for method in METHODS]


def cell(problem: str, base: Settings, method: str, seed: int) -> Cell:
    """Return the cell of one method on one problem with one seed."""
    return Cell(problem, method, seed, {**_COMMON, **base, **METHODS[method](base)})


_COMMON: Settings = {"controller": "fixed", "curvature": "off", "plots": False, "threads": 1}


def _tuning(name: str, optimizer: Any, rate: float) -> Cell:
    sixth = {**BASE, "train_examples": 3072, "epochs": 1}
    settings = {**_COMMON, **sixth, **_at(optimizer, rate, 1)(sixth)}
    return Cell("tuning", f"{name}-{rate:g}", TUNING_SEED, settings)
