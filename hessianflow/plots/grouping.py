"""Groups of runs of the same experiment, which agree in all settings but the seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hessianflow.plots.records import Run, distinct
from hessianflow.upgrade import upgrade

# Settings that do not change what is computed on average, by the last part of their name.
_IGNORED = frozenset({"seed", "run_dir", "data_dir", "plots", "tensorboard", "keep_checkpoints"})
# Sections about place and time, and those that follow from other settings.
_IGNORED_SECTIONS = ("environment.", "versions.", "dual_batch.", "resolution_stages")
# Settings that a user chooses, beginning with those that distinguish runs best; all others follow
# in the order of config.json.
_FIRST = (
    *("controller", "optimizer", "adversary", "model", "data", "batch_size", "max_batch_size"),
    *("lr", "epochs", "schedule", "resolution", "patience", "decay_factor", "growth_factor"),
    *("eps", "share", "rho"),
)
# The section of the user's settings, from which other sections follow.
_CHOSEN = "settings."


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: the fewest settings that tell this group from the others; the run's name if there is
            none.
        runs: the runs of the group.
    """

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return groups in order of appearance; a run without a config.json is a group of its own."""
    settings = [flatten(_in_words_of_today(run.config)) for run in runs]
    members: dict[str, list[int]] = {}
    for index, (run, setting) in enumerate(zip(runs, settings, strict=True)):
        identity = f"run {index} {run.name}"
        if setting:
            identity = json.dumps(setting, sort_keys=True)
        members.setdefault(identity, []).append(index)
    firsts = [settings[indices[0]] for indices in members.values()]
    telling = _telling(firsts)
    groups = []
    for indices, setting in zip(members.values(), firsts, strict=True):
        label = _label(setting, telling) or runs[indices[0]].name
        groups.append(Group(label, tuple(runs[i] for i in indices)))
    # Settings that look the same may differ in something that labels do not show.
    longer = [f"{group.label} ({group.runs[0].name})" for group in groups]
    labels = distinct([group.label for group in groups], longer)
    return [replace(group, label=label) for group, label in zip(groups, labels, strict=True)]


def _in_words_of_today(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record in which a run of an older release has its options at their methods."""
    settings = config.get("settings")
    if not isinstance(settings, Mapping):
        return config
    return {**config, "settings": upgrade(settings)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {"trainer.epochs": 30, ...}, without those of place and time.

    The name of a method stands for it: {"controller": {"name": "absa"}} gives "controller".
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_method = key == "name" and prefix.startswith(_CHOSEN) and prefix != _CHOSEN
        name = prefix.rstrip(".") if is_method else f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif key not in _IGNORED and not name.startswith(_IGNORED_SECTIONS):
            flat[name] = value
    return flat


def seed_of(config: Mapping[str, Any]) -> Any:
    """Return the seed from any level of the nested settings; None without one."""
    if "seed" in config:
        return config["seed"]
    seeds = (seed_of(value) for value in config.values() if isinstance(value, Mapping))
    return next((seed for seed in seeds if seed is not None), None)


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a few keys whose values together tell all of these settings apart.

    Keys that a user chooses come first, and derived ones are used only if those are not enough.
    Each key is the one that separates most of what the keys before it leave together, the first of
    equals; a key that later ones make superfluous is dropped.
    """

    texts = [
        {key: json.dumps(value, default=str) for key, value in setting.items()}
        for setting in settings
    ]

    def parted(keys: Sequence[str]) -> int:
        return len({tuple(setting.get(key, "") for key in keys) for setting in texts})

    every = dict.fromkeys(key for setting in settings for key in setting)
    known = sorted((key for key in every if parted([key]) > 1), key=_rank)
    chosen: list[str] = []
    for level in sorted({_rank(key)[0] for key in known}):
        candidates = [key for key in known if _rank(key)[0] == level]
        while candidates:
            best = max(candidates, key=lambda key: parted([*chosen, key]))
            if parted([*chosen, best]) == parted(chosen):
                break
            chosen.append(best)
    for key in list(reversed(chosen)):
        fewer = [other for other in chosen if other != key]
        if parted(fewer) == parted(chosen):
            chosen = fewer
    # An option that some methods do not have means little without the name of the method.
    partial = [key for key in chosen if any(key not in setting for setting in settings)]
    methods = [key.rpartition(".")[0] for key in partial]
    return sorted({*chosen, *(key for key in methods if key in every)}, key=_rank)


def _rank(key: str) -> tuple[int, int]:
    """Return the rank of a key: what the user chose, beginning with _FIRST, then what follows.

    A run made from Python has no chosen settings, so that its trainer's are ranked alike.
    """
    name = key.rsplit(".", 1)[-1]
    level = 2 * (not key.startswith(_CHOSEN))
    if name in _FIRST:
        return (level, _FIRST.index(name))
    return (level + 1, 0)


def _label(setting: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the values of these keys, each after the last part of its name."""
    values = {key.rsplit(".", 1)[-1]: setting[key] for key in reversed(keys) if key in setting}
    for name, value in values.items():
        if value is None:
            values[name] = "default"
    return ", ".join(f"{name}={value}" for name, value in reversed(values.items()))
