"""The cells of the study: one small and one large batch, the large one at the same rate and at a
scaled one."""

from collections.abc import Mapping, Sequence

from experiments.absa_cifar.grid import CIFAR10, SMOKE
from experiments.large_batch import NO_LIMIT, Settings
from experiments.runner import Cell, Scale

PROGRAM = "experiments.spectra.measure"
_DIGITS: Settings = {
    "data": "digits",
    "batch_size": 32,
    "max_batch_size": 512,
    "epochs": 40,
    "lr": 0.05,
    "schedule": {"name": "multistep", "milestones": [26, 35]},
    "microbatch_size": 32,
    "norm_batch_size": 32,
}
_SMOKE: Settings = {
    **SMOKE,
    "epochs": 2,
    "schedule": {**SMOKE["schedule"], "milestones": [1]},
}
_PROBLEMS: Mapping[Scale, tuple[str, Settings, Sequence[int]]] = {
    "smoke": ("fake", _SMOKE, (1, 2)),
    "cpu": ("digits", _DIGITS, (1, 5, 15, 40)),
    "gpu": (
        "cifar10-resnet20",
        {**CIFAR10, "model": "resnet20", "max_batch_size": 4096},
        (1, 15, 45, 90),
    ),
    "full": (
        "cifar10-resnet20",
        {**CIFAR10, "model": "resnet20", "max_batch_size": 16_384},
        (1, 15, 45, 90),
    ),
}
"""Name, settings, and the epochs after which the spectrum is measured."""
PRECISION: Mapping[Scale, Settings] = {
    "smoke": {"examples": 32, "probes": 1, "steps": 4, "points": 5},
    "cpu": {"examples": 256, "probes": 2, "steps": 40, "points": 21},
    "gpu": {"examples": 1024, "probes": 4, "steps": 80, "points": 41},
    "full": {"examples": 2048, "probes": 8, "steps": 100, "points": 41},
}
"""Of the measurements: training examples, random starts and steps of the density, points of a
slice."""


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, method by method, each seed after the other."""
    problem, base, epochs = _PROBLEMS[scale]
    extra = {"measured_after": list(epochs), **PRECISION[scale]}
    common: Settings = {
        "controller": "fixed",
        "adversary": "none",
        "curvature": "epoch",
        "norm_mode": "batch",
    }
    common["curvature_budget"] = NO_LIMIT
    common |= {"keep_checkpoints": base["epochs"] + 1, "plots": False, "threads": 1}
    return [
        Cell(problem, method, seed, {**common, **base, **changes}, PROGRAM, extra)
        for method, changes in _methods(base).items()
        for seed in (seeds if scale != "smoke" else [0])
    ]


def _methods(base: Settings) -> dict[str, Settings]:
    """The last with a warm-up over the 5 epochs of Goyal et al., or less in a run shorter than
    10."""
    small, large = base["batch_size"], base["max_batch_size"]
    scaled = {"lr": base["lr"] * large / small, "warmup_epochs": min(5, base["epochs"] / 2)}
    return {
        f"batch {small}": {"max_batch_size": small},
        f"batch {large}": {"batch_size": large},
        f"batch {large}, rate scaled": {"batch_size": large, **scaled},
    }
