"""Which runs are the same experiment: runs are grouped by all their settings but the seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessianflow.plots.records import Run
from hessianflow.upgrade import upgrade

# Settings that do not change what is computed on average, by the last part of their name.
_IGNORED = frozenset({"seed", "run_dir", "data_dir", "plots", "tensorboard", "keep_checkpoints"})
# What says where and when, and what follows from other settings.
_IGNORED_SECTIONS = ("environment.", "versions.", "dual_batch.", "resolution_stages")
# What a user sets on purpose, that which tells runs apart best first; all others follow as
# config.json has them.
_FIRST = (
    *(
        "controller",
        "optimizer",
        "adversary",
        "model",
        "data",
        "batch_size",
        "max_batch_size",
        "lr",
        "epochs",
    ),
    *(
        "schedule",
        "resolution",
        "patience",
        "decay_factor",
        "growth_factor",
        "eps",
        "share",
        "rho",
    ),
)
# Settings as given; what other sections hold follows from them.
_GIVEN = "settings."


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: the fewest settings that tell this group from the others; the run's name if there is
            none.
        runs: its members.
    """

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of first appearance; a run without a config.json is a group of its own."""
    settings = [flatten(_in_words_of_today(run.config)) for run in runs]
    members: dict[str, list[int]] = {}
    for index, (run, setting) in enumerate(zip(runs, settings, strict=True)):
        identity = json.dumps(setting, sort_keys=True) if setting else f"run {index} {run.name}"
        members.setdefault(identity, []).append(index)
    firsts = [settings[indices[0]] for indices in members.values()]
    telling = _telling(firsts)
    groups = []
    for indices, setting in zip(members.values(), firsts, strict=True):
        label = _label(setting, telling) or runs[indices[0]].name
        groups.append(Group(label, tuple(runs[i] for i in indices)))
    return _distinct(groups)


def _in_words_of_today(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record in which a run of an older release has its options at their methods."""
    given = config.get("settings")
    return {**config, "settings": upgrade(given)} if isinstance(given, Mapping) else config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"trainer.epochs": 30, ...}, without those that only say where and
    when.

    The name of a method stands for it: {"controller": {"name": "absa"}} gives "controller".
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_method = key == "name" and prefix.startswith(_GIVEN) and prefix != _GIVEN
        name = prefix.rstrip(".") if is_method else f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif key not in _IGNORED and not name.startswith(_IGNORED_SECTIONS):
            flat[name] = value
    return flat


def seed_of(config: Mapping[str, Any]) -> Any:
    """The seed, wherever in the nested settings it stands; None without one."""
    if "seed" in config:
        return config["seed"]
    found = (seed_of(value) for value in config.values() if isinstance(value, Mapping))
    return next((seed for seed in found if seed is not None), None)


def _text(setting: Mapping[str, Any], key: str) -> str:
    return json.dumps(setting[key], default=str) if key in setting else ""


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Few keys whose values together tell all of these settings apart, those that a user sets on
    purpose first.

    Each key is the one that parts most of what those before it leave together, the first of several
    such; a key that the later ones make superfluous is dropped. What follows from other settings is
    asked only when those do not do.
    """

    def parted(keys: Sequence[str]) -> int:
        return len({tuple(_text(setting, key) for key in keys) for setting in settings})

    every = dict.fromkeys(key for setting in settings for key in setting)
    known = sorted((key for key in every if parted([key]) > 1), key=_rank)
    chosen: list[str] = []
    for level in sorted({_rank(key)[0] for key in known}):
        candidates = [key for key in known if _rank(key)[0] == level]
        while candidates:
            best = max(candidates, key=lambda key: parted([*chosen, key]))  # of equals, the first
            if parted([*chosen, best]) == parted(chosen):
                break
            chosen.append(best)
    for key in list(reversed(chosen)):
        fewer = [other for other in chosen if other != key]
        chosen = fewer if parted(fewer) == parted(chosen) else chosen
    # An option that some methods do not have means little without the name of the method.
    partial = [key for key in chosen if any(key not in setting for setting in settings)]
    methods = [key.rpartition(".")[0] for key in partial]
    return sorted({*chosen, *(key for key in methods if key in every)}, key=_rank)


def _rank(key: str) -> tuple[int, int]:
    """How early a setting is asked: those named above, other settings as given, what follows from
    them."""
    name = key.rsplit(".", 1)[-1]
    if name in _FIRST:
        return (0, 2 * _FIRST.index(name) + (not key.startswith(_GIVEN)))
    return (1 if key.startswith(_GIVEN) else 2, 0)


def _label(setting: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The values of these keys, each under the last part of its name."""
    parts = {key.rsplit(".", 1)[-1]: setting[key] for key in reversed(keys) if key in setting}
    return ", ".join(
        f"{name}={'default' if value is None else value}" for name, value in reversed(parts.items())
    )


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """Settings that look the same may differ where nothing is shown: add the first run's name to
    those labels."""
    labels = [g.label for g in groups]
    return [
        g if labels.count(g.label) == 1 else Group(f"{g.label} ({g.runs[0].name})", g.runs)
        for g in groups
    ]
