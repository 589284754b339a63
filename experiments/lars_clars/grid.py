"""The cells of the study: a large batch from the first step, by optimizer, rate, and with or
without warm-up."""

from collections.abc import Mapping, Sequence

from experiments.absa_cifar.grid import CIFAR10, SMOKE
from experiments.large_batch import Settings
from experiments.runner import Cell, Scale

_DIGITS: Settings = {
    "data": "digits",
    "batch_size": 512,
    "max_batch_size": 512,
    "epochs": 30,
    "schedule": {"name": "multistep", "milestones": [20, 26]},
    "microbatch_size": 32,
    "norm_batch_size": 32,
}
_CIFAR: Settings = {**CIFAR10, "model": "resnet20", "augment": True, "microbatch_size": 128}
PROBLEMS: Mapping[Scale, Mapping[str, Settings]] = {
    "smoke": {
        "fake-64": {
            **SMOKE,
            "batch_size": 64,
            "max_batch_size": 64,
            "epochs": 2,
            "schedule": {**SMOKE["schedule"], "milestones": [1]},
        }
    },
    "cpu": {"digits-512": _DIGITS},
    "gpu": {"cifar10-4096": {**_CIFAR, "batch_size": 4096, "max_batch_size": 4096}},
    "full": {
        f"cifar10-{batch}": {**_CIFAR, "batch_size": batch, "max_batch_size": batch}
        for batch in (1024, 4096, 16_384)
    },
}
"""By scale; the batch is the last part of the name."""
RATES: Mapping[str, Sequence[float]] = {
    "sgd": (0.05, 0.1, 0.2, 0.4, 0.8),
    "lars": (1.25, 2.5, 5.0, 10.0, 20.0),
    "clars": (0.25, 0.5, 1.0, 2.0, 4.0),
}
"""Around what works for each optimizer on digits; LARS has a trust coefficient of 0.001, CLARS one
of 0.01."""
WARMUP = 1 / 6
"""Part of the run over which the rate rises: 5 of 30 epochs."""


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """Every optimizer at every rate, without and with warm-up; one rate and seed on the smoke
    scale."""
    smoke = scale == "smoke"
    return [
        _cell(problem, base, optimizer, rate, seed, warm=warm)
        for problem, base in PROBLEMS[scale].items()
        for seed in (seeds if not smoke else [0])
        for optimizer, rates in RATES.items()
        for rate in (rates if not smoke else rates[:1])
        for warm in (False, True)
    ]


def _cell(
    problem: str, base: Settings, optimizer: str, rate: float, seed: int, *, warm: bool
) -> Cell:
    fixed = {
        "controller": "fixed",
        "adversary": "none",
        "curvature": "off",
        "plots": False,
        "threads": 1,
    }
    chosen = {
        "optimizer": optimizer,
        "lr": rate,
        "warmup_epochs": round(base["epochs"] * WARMUP, 1) if warm else 0.0,
    }
    method = f"{optimizer}{' warm-up' if warm else ''}, rate {rate:g}"
    return Cell(problem, method, seed, {**fixed, **base, **chosen})
