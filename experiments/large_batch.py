"""The methods of the large-batch literature as changes of a problem's settings, for the studies
that compare them.

The rate of every problem is stated at its first batch size, and batch normalisation sees groups of
that size whatever the batch, so that only the size of a step differs between methods.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.runner import Cell
from hessianflow.optim.rate_schedules import cooldown_start

Settings = dict[str, Any]
PUBLISHED_EPOCHS, PUBLISHED_PATIENCE = 90, 10
NO_LIMIT = 100
"""Curvature budget of a study on few images: a reading after every epoch, whatever its share of the
cost."""

PUBLISHED: Settings = {
    "batch_size": 128,
    "epochs": PUBLISHED_EPOCHS,
    "lr": 0.1,
    "schedule": {"name": "multistep", "milestones": [30, 60, 80], "lr_decay": 0.2},
    "microbatch_size": "auto",
    "norm_batch_size": 128,
    "probe_examples": 128,
    "precision": "bf16",
    "channels_last": True,
}
"""The published ABSA runs on CIFAR (arXiv:1810.01021 and its code): momentum 0.9, no weight
decay."""


def shortened(settings: Settings, part: int) -> Settings:
    """A `part`-th of the epochs, with the milestones at their places in the run."""
    milestones = sorted({milestone // part for milestone in settings["schedule"]["milestones"]})
    return {
        **settings,
        "epochs": settings["epochs"] // part,
        "schedule": {**settings["schedule"], "milestones": milestones},
    }


def _absa(base: Settings, name: str = "absa", **options: Any) -> Settings:
    """The published settings, the patience being the same part of the run: 10 of 90 epochs."""
    patience = max(1, round(base["epochs"] * PUBLISHED_PATIENCE / PUBLISHED_EPOCHS))
    return {
        "controller": {"name": name, "patience": patience, **options},
        "adversary": "fgsm" if name == "absa" else "none",
        "curvature": "needed",
    }


def growing_instead(base: Settings) -> Settings:
    """Growth by the inverse of the decay at every milestone, and a constant rate."""
    usual = base["schedule"]
    controller = {
        "name": "grow-instead-of-decay",
        "milestones": usual["milestones"],
        "decay_factor": 1 / usual["lr_decay"],
    }
    return {"controller": controller, "schedule": None}


def cooldown(base: Settings) -> Settings:
    """The schedule of ours, as the command has it by default: constant for two thirds, then
    linearly to 0."""
    return {"schedule": {"name": "cooldown", "decay_from": cooldown_start(base["epochs"])}}


def critical(base: Settings) -> Settings:
    """Ours with the command's defaults spelled out, so that rows name what they were made with."""
    controller = {
        "name": "critical",
        "loss_power": 1 / 0.21,
        "edge_share": 3 / 4,
        "excess_power": 1 / 4,
    }
    # no readings at the cap
    measured = {"norm_mode": "batch", "curvature": "needed"}
    return {"controller": controller, **cooldown(base), **measured}


METHODS: Mapping[str, Callable[[Settings], Settings]] = {
    "fixed": lambda _: {"curvature": "epoch"},  # in running statistics, for replays of ABSA
    "absa": _absa,
    "critical": critical,
    "abs": lambda base: _absa(base, "abs"),
    "grow-instead-of-decay": growing_instead,
    "warmup": lambda _: {"controller": "warmup"},
    "lars": lambda _: {"controller": "warmup", "optimizer": "lars"},
    "clars": lambda base: {
        "batch_size": base["max_batch_size"],
        "lr": base["lr"] * base["max_batch_size"] / base["batch_size"],
        "optimizer": "clars",
        "microbatch_size": base["batch_size"],  # it compares the gradients of several a step
    },
    "fixed-fgsm": lambda _: {"adversary": "fgsm"},
    "fixed-cooldown": cooldown,
    "absa-eigenvalue-only": lambda base: _absa(base, patience=None),
    "absa-patience-only": lambda base: _absa(base, decay_factor=1e9),
}
"""What each method changes in a problem's settings, the most useful first."""
MAIN = ("fixed", "absa", "critical")
ONE_SIZE = ("fixed", "fixed-fgsm", "fixed-cooldown")
"""Those that do not know the cap: run once, not once a cap."""


def cells(
    problems: Mapping[str, Settings],
    caps: Sequence[int],
    seeds: Sequence[int],
    methods: Iterable[str],
) -> list[Cell]:
    """Every method on every problem under every cap, seed by seed; named METHOD, or METHOD-CAP
    where there are caps.

    Args:
        problems: their settings by name.
        caps: largest batch sizes; none: the problem's own.
        seeds: of the runs.
        methods: of METHODS.
    """
    found = []
    for problem, base in problems.items():
        for seed in seeds:
            for method in methods:
                for cap in caps or [base["max_batch_size"]]:
                    name = f"{method}-{cap}" if caps and method not in ONE_SIZE else method
                    found.append(
                        _cell(problem, {**base, "max_batch_size": cap}, method, name, seed)
                    )
    return list({(cell.problem, cell.method, cell.seed): cell for cell in found}.values())


def _cell(problem: str, base: Settings, method: str, name: str, seed: int) -> Cell:
    common = {
        "controller": "fixed",
        "adversary": "none",
        "curvature": "off",
        "curvature_budget": NO_LIMIT,
    }
    common |= {"plots": False, "threads": 1}
    if method in ONE_SIZE:
        base = {**base, "max_batch_size": base["batch_size"]}
    return Cell(problem, name, seed, {**common, **base, **METHODS[method](base)})
