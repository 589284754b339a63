"""The cells of the controller study: problems times methods, every method with one setting for all
problems.

The rate of every problem is stated at its first batch size, and batch normalisation sees groups of
that size whatever the batch, so that only the size of a step differs between methods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.absa_cifar.grid import FIFTH
from experiments.large_batch import NO_LIMIT, cooldown, critical, growing_instead
from experiments.runner import Cell, Scale
from experiments.squeezenext.grid import SMALL

Settings = dict[str, Any]

_CIFAR: Settings = {
    "data": "cifar10",
    "train_examples": 10_000,
    "test_examples": 5_000,
    "batch_size": 128,
    "max_batch_size": 2048,
    "epochs": 24,
    "lr": 0.1,
    "schedule": {"name": "multistep", "milestones": [8, 16, 21], "lr_decay": 0.2},
    "augment": False,
    "precision": "bf16",
    "channels_last": True,
    "microbatch_size": 128,
    "norm_batch_size": 128,
}
_DIGITS: Settings = {
    "data": "digits",
    "batch_size": 32,
    "max_batch_size": 512,
    "epochs": 30,
    "lr": 0.05,
    "schedule": {"name": "multistep", "milestones": [20, 26], "lr_decay": 0.2},
    "microbatch_size": 32,
    "norm_batch_size": 32,
}
PROBLEMS: Mapping[str, Settings] = {
    "cifar-resnet8": {**_CIFAR, "model": "resnet8"},
    "digits": _DIGITS,
    "cifar-plain": {**_CIFAR, "model": "experiments.controllers.networks:plain", "lr": 0.02},
    "cifar-resnet8-augmented": {**_CIFAR, "model": "resnet8", "augment": True},
    "cifar-resnet8-hard": {**_CIFAR, "model": "resnet8", "train_examples": 4_000},
    "cifar-resnet20": {**FIFTH, "model": "resnet20"},
    "cifar-squeezenext": SMALL,
    "fake": {
        "data": "fake",
        "train_examples": 256,
        "test_examples": 64,
        "model": "resnet8",
        "batch_size": 32,
        "max_batch_size": 128,
        "epochs": 4,
        "lr": 0.02,
        "schedule": {"name": "multistep", "milestones": [2], "lr_decay": 0.2},
        "microbatch_size": 32,
        "norm_batch_size": 32,
        "precision": "float32",
    },
}
MAIN = ("fixed", "timed", "absa", "critical-reuse")
"""The methods that matter, run on every problem."""
ALL = ("digits", "cifar-resnet8")
"""The problems on which every method runs."""
VARIANTS = ("critical", "fixed-cooldown", "timed-reuse", "fixed-reuse")
"""Ours without an attack, fixed under the schedule of ours, timed and fixed with an attack; on
every problem, last."""
LARGE = (
    "muon-20x",
    "muon-16x",
    "muon-critical",
    "muon-seesaw",
    "muon-8x",
    "muon-32x",
    "muon-1x",
    "adamw-16x",
    "adamw-1x",
)
"""Other optimizers than SGD, on every problem."""


def cells(scale: Scale, seeds: Sequence[int]) -> list[Cell]:
    """The grid, seed by seed, in the order of usefulness.

    smoke: the main four once on made-up data. cpu: the main four on one problem after the other,
    then all other methods of SGD on digits and the first, then other optimizers on all, then the
    variants on the rest.
    gpu, full: the same on all of CIFAR-10 with the published 90 epochs, ResNet-20.
    """
    if scale == "smoke":
        return [cell("fake", PROBLEMS["fake"], method, 0) for method in MAIN]
    if scale != "cpu":
        return [
            cell("cifar-resnet20-whole", _whole(scale), method, seed)
            for seed in seeds
            for method in METHODS
        ]
    problems = [name for name in PROBLEMS if name != "fake"]
    found = [
        cell(name, PROBLEMS[name], method, seed)
        for name in problems
        for seed in seeds
        for method in MAIN
    ]
    rest = [method for method in METHODS if method not in (*MAIN, *LARGE)]
    found += [
        cell(name, PROBLEMS[name], method, seed)
        for name in ALL
        for seed in seeds
        for method in rest
    ]
    found += [
        cell(name, PROBLEMS[name], method, seed)
        for method in LARGE
        for seed in seeds
        for name in problems
    ]
    others = [name for name in problems if name not in ALL]
    return found + [
        cell(name, PROBLEMS[name], method, seed)
        for name in others
        for seed in seeds
        for method in VARIANTS
    ]


def _whole(scale: Scale) -> Settings:
    """ResNet-20 on all 50,000 images; the cap of the published runs on the full scale."""
    whole = {
        key: value
        for key, value in _CIFAR.items()
        if key not in ("train_examples", "test_examples")
    }
    cap = 16_384 if scale == "full" else 4_096
    schedule = {**_CIFAR["schedule"], "milestones": [30, 60, 80]}
    longer = {"epochs": 90, "schedule": schedule, "augment": True, "max_batch_size": cap}
    return {**whole, **longer, "model": "resnet20", "microbatch_size": "auto"}


def cell(problem: str, settings: Settings, method: str, seed: int) -> Cell:
    """One cell."""
    common = {"controller": "fixed", "adversary": "none", "curvature": "off", "probe_examples": 64}
    common |= {"curvature_budget": NO_LIMIT, "plots": False, "threads": 1}
    return Cell(problem, method, seed, {**common, **settings, **METHODS[method](settings)})


def _large(base: Settings, **changes: Any) -> Settings:
    """The cap from the start, with the rate scaled linearly."""
    cap = base["max_batch_size"]
    return {"batch_size": cap, "lr": base["lr"] * cap / base["batch_size"], **changes}


def _clars_split(base: Settings, factor: float) -> Settings:
    """CLARS with `factor` times the rate for layers that are not adapted, and the default's for
    those that are."""
    return _large({**base, "lr": factor * base["lr"]}, optimizer=_clars(0.01 / factor))


def _clars(trust_coefficient: float) -> Settings:
    return {"name": "clars", "trust_coefficient": trust_coefficient}


def _absa(name: str = "absa", adversary: str = "fgsm", **options: Any) -> Settings:
    """The published setting: fast gradient sign attack on a fifth, patience 10, running statistics,
    128 examples."""
    controller = {"name": name, "patience": 10, **options}
    measured = {"probe_examples": 128, "curvature": "needed"}
    return {"controller": controller, "adversary": adversary, **measured}


def _adabatch(base: Settings) -> Settings:
    """Twice the batch and 0.75 times the rate after every fifth of the run, as in the published 100
    epochs."""
    every = max(1, round(base["epochs"] / 5))
    return {"controller": {"name": "adabatch", "every_epochs": every}, "schedule": "constant"}


def _fixed_linear(base: Settings) -> Settings:
    """One batch size, and the decay of timed from a third of the run on."""
    controller = {"name": "timed", "stages": [], "decay_from": -(-base["epochs"] // 3)}
    return {"controller": controller, "schedule": "constant"}


_TIMED: Settings = {"controller": "timed", "schedule": "constant"}

MUON_RATE = 0.24
"""That of airbench, the default of the command; for 16 times the first batch and more."""
_LINEAR: Settings = {"name": "polynomial", "power": 1.0}
DIGITS_EXAMPLES = 1_437


def _times(base: Settings, times: int) -> int:
    """Return a multiple of the first batch, but at most all training images."""
    images: int = base.get("train_examples", DIGITS_EXAMPLES)
    return min(times * int(base["batch_size"]), images)


def _muon(times: int, rate: float = MUON_RATE) -> Callable[[Settings], Settings]:
    """Return Muon with its defaults at `times` the first batch throughout, without a warm-up."""
    return lambda base: {
        "optimizer": "muon",
        "batch_size": _times(base, times),
        "max_batch_size": _times(base, times),
        "lr": rate,
        "schedule": _LINEAR,
    }


def _adamw(times: int, rate: float) -> Callable[[Settings], Settings]:
    """Return AdamW at `times` the first batch throughout."""
    return lambda base: {**_muon(times, rate)(base), "optimizer": "adamw"}


def _growing(**controller: Any) -> Callable[[Settings], Settings]:
    """Return Muon from 16 times the first batch on, under a controller that may take it to 64."""
    return lambda base: {
        **_muon(16)(base),
        "max_batch_size": _times(base, 64),
        "controller": controller,
    }


METHODS: Mapping[str, Callable[[Settings], Settings]] = {
    "fixed": lambda _: {"curvature": "epoch", "norm_mode": "batch"},  # recorded for replays
    "timed": lambda _: _TIMED,
    "absa": lambda _: _absa(),
    "fixed-linear": _fixed_linear,
    "fixed-max": _large,
    "fixed-max-warmup": lambda _: {"controller": "warmup"},
    "lars-warmup": lambda _: {"controller": "warmup", "optimizer": "lars"},
    "lars-warmup-0.003": lambda _: {
        "controller": "warmup",
        "optimizer": {"name": "lars", "trust_coefficient": 0.003},
    },
    "clars": lambda base: _large(base, optimizer="clars"),
    "clars-0.02": lambda base: _large(base, optimizer=_clars(0.02)),
    "clars-0.03": lambda base: _large(base, optimizer=_clars(0.03)),
    "clars-0.04-quarter-rate": lambda base: _clars_split(base, 1 / 4),
    "clars-0.005-twice-rate": lambda base: _clars_split(base, 2),
    "clars-0.0025-four-rate": lambda base: _clars_split(base, 4),
    "noise-scale": lambda base: {
        "controller": "noise-scale",
        "microbatch_size": base["batch_size"] // 4,
    },
    "adabatch": _adabatch,
    "grow-instead-of-decay": growing_instead,
    "abs": lambda _: _absa("abs", "none"),
    "absa-reuse": lambda _: _absa(adversary="reuse"),
    "absa-patience-only": lambda _: _absa(decay_factor=1e9),
    "absa-eigenvalue-only": lambda _: _absa(patience=None),
    "fixed-reuse": lambda _: {"adversary": "reuse"},
    "timed-reuse": lambda _: {**_TIMED, "adversary": "reuse"},
    "critical-reuse": lambda base: {**critical(base), "adversary": "reuse"},
    "critical": critical,
    "fixed-cosine": lambda _: {"schedule": "cosine"},
    "fixed-cooldown": cooldown,
    "muon-20x": _muon(20),
    "muon-16x": _muon(16),
    "muon-32x": _muon(32),
    "muon-critical": lambda base: {
        **_growing(name="critical", edge_share=None)(base),
        "lr_rule": "sqrt",
    },
    "muon-seesaw": lambda base: {**_growing(name="seesaw")(base), "schedule": "cosine"},
    "muon-cosine-16x": lambda base: {**_muon(16)(base), "schedule": "cosine"},
    "muon-8x": _muon(8),
    "muon-1x": _muon(1, MUON_RATE / 4),
    "adamw-16x": _adamw(16, 0.004),
    "adamw-1x": _adamw(1, 0.001),
}
"""What each method changes in a problem's settings. Rows of other names were made by code that is
no longer here."""
