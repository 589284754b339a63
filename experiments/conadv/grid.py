"""The cells of the study: one large batch, trained clean, on adversarial examples made in several
ways, and with SAM.

The published runs sum the two means, under LARS, whose steps do not depend on the size of the
gradient. Here twins are averaged in, so that the rate means the same for every method under any
optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.runner import Cell, Scale

PROGRAM = "experiments.conadv.attacked"
Settings = dict[str, Any]

EPS = 2 / 255
"""The reference leaves it open (1/255 to 4/255 to start with); the same for every method."""
DIGITS_EPS = 0.1
"""The pixels of digits have 17 values."""
CIFAR: Settings = {
    "data": "cifar10",
    "model": "resnet8",
    "train_examples": 10_000,
    "test_examples": 5_000,
    "batch_size": 2048,
    "max_batch_size": 2048,
    "epochs": 6,
    "optimizer": "adam",
    "lr": 0.01,
    "warmup_epochs": 1,
    "schedule": "cosine",
    "microbatch_size": 128,
    "norm_batch_size": 128,
    "precision": "float32",
    "channels_last": True,
}
"""Adam because 30 updates are few: see the README for the two short runs that chose it."""
DIGITS: Settings = {
    "data": "digits",
    "batch_size": 512,
    "max_batch_size": 512,
    "epochs": 30,
    "lr": 0.8,  # the preset's 0.05 for 32 examples, scaled linearly
    "warmup_epochs": 3,
    "schedule": "cosine",
    "microbatch_size": 128,
    "norm_batch_size": 128,
}
FAKE: Settings = {
    **CIFAR,
    "data": "fake",
    "optimizer": "sgd",
    "train_examples": 256,
    "test_examples": 64,
    "batch_size": 64,
    "max_batch_size": 64,
    "epochs": 2,
    "lr": 0.02,
    "warmup_epochs": 0,
    "microbatch_size": 32,
    "norm_batch_size": 32,
    "precision": "float32",
}


def _average(eps: float, staleness: int) -> Settings:
    """ConAdv with twins that are averaged in."""
    adversary = {"name": "conadv", "staleness": staleness, "combine": "average"}
    return {"adversary": {**adversary, "attack": {"name": "fgsm", "eps": eps}}}


def _share(name: str, share: float) -> Callable[[Settings, float], Settings]:
    """An attack on a share of every batch."""
    return lambda _, eps: {"adversary": {"name": name, "share": share, "eps": eps}}


def _sam(base: Settings, _eps: float) -> Settings:
    """SAM around the optimizer of the problem, on clean examples."""
    inner = {"name": base.get("optimizer", "sgd")}
    return {"adversary": "none", "optimizer": {"name": "sam", "rho": 0.05, "base": inner}}


METHODS: Mapping[str, Callable[[Settings, float], Settings]] = {
    "clean": lambda _base, _eps: {"adversary": "none"},
    "fgsm-0.2": _share("fgsm", 0.2),
    "synchronous": lambda _, eps: _average(eps, 0),
    "conadv-1": lambda _, eps: _average(eps, 1),
    "conadv-2": lambda _, eps: _average(eps, 2),
    "reuse-0.2": _share("reuse", 0.2),
    "reuse-1.0": _share("reuse", 1.0),
    "sam-0.05": _sam,
}
"""What each method changes in a problem's settings, by the size of the attack."""


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, seed by seed.

    smoke: every method once on made-up data.
    cpu: digits (seconds a cell), then a fifth of CIFAR-10, ResNet-8, 6 epochs.
    gpu: all of CIFAR-10, ResNet-20, 90 epochs; full: the same at batch 8192.
    """
    if scale == "smoke":
        attack = {"attack_eps": [EPS], "attack_steps": 2, "attack_examples": 32}
        return [_cell("fake", FAKE, method, 0, attack) for method in METHODS]
    problems = (
        {"digits": DIGITS, "cifar-resnet8-fifth": CIFAR}
        if scale == "cpu"
        else {"cifar-resnet20": _whole(scale)}
    )
    return [
        _cell(
            problem,
            base,
            method,
            seed,
            {**_attack(problem), "attack_eps": [_eps(problem), 2 * _eps(problem)]},
        )
        for problem, base in problems.items()
        for seed in seeds
        for method in METHODS
    ]


def _eps(problem: str) -> float:
    return DIGITS_EPS if problem == "digits" else EPS


def _attack(problem: str) -> Settings:
    """Half the steps and images where a processor attacks large ones: else it takes as long as the
    training."""
    short = problem == "cifar-resnet8-fifth"
    return {"attack_steps": 10 if short else 20, "attack_examples": 500 if short else 1000}


def _whole(scale: Scale) -> Settings:
    batch = 8192 if scale == "full" else 2048
    whole = {
        name: value
        for name, value in CIFAR.items()
        if name not in ("train_examples", "test_examples")
    }
    sizes = {
        "batch_size": batch,
        "max_batch_size": batch,
        "optimizer": "sgd",
        "lr": 0.1 * batch / 128,
    }
    return {
        **whole,
        **sizes,
        "precision": "bf16",
        "model": "resnet20",
        "epochs": 90,
        "warmup_epochs": 5,
        "microbatch_size": "auto",
    }


def _cell(problem: str, base: Settings, method: str, seed: int, attack: Mapping[str, Any]) -> Cell:
    common = {"controller": "fixed", "curvature": "off", "plots": False, "threads": 1}
    settings = {**common, **base, **METHODS[method](base, _eps(problem))}
    return Cell(problem, method, seed, settings, PROGRAM, attack)
