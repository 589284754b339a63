"""Which runs are the same experiment: runs are grouped by all their settings but the seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessianflow.plots.records import Run

# Settings that do not change what is computed on average, by the last part of their name.
_IGNORED = frozenset({"seed", "run_dir", "data_dir", "plots", "tensorboard", "keep_checkpoints"})
# What says where and when, and what follows from other settings.
_IGNORED_SECTIONS = ("environment.", "versions.", "dual_batch.", "resolution_stages")
# A label with more settings than this is longer than what it labels.
_MAX_LABEL_PARTS = 4


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: the settings in which this group differs from the others; the run's name if there is none.
        runs: its members.
    """

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of first appearance; a run without a config.json is a group of its own."""
    settings = [flatten(run.config) for run in runs]
    members: dict[str, list[int]] = {}
    for index, (run, setting) in enumerate(zip(runs, settings, strict=True)):
        identity = json.dumps(setting, sort_keys=True) if setting else f"run {index} {run.name}"
        members.setdefault(identity, []).append(index)
    firsts = [settings[indices[0]] for indices in members.values()]
    differing = [key for key in dict.fromkeys(k for s in firsts for k in s) if len({_text(s, key) for s in firsts}) > 1]
    groups = []
    for indices, setting in zip(members.values(), firsts, strict=True):
        label = _label(setting, differing) or runs[indices[0]].name
        groups.append(Group(label, tuple(runs[i] for i in indices)))
    return _distinct(groups)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"trainer.epochs": 30, ...}, without those that only say where and when."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
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


def _label(setting: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = []
    seen: set[str] = set()
    for key in keys:
        short = key.rsplit(".", 1)[-1]
        if key in setting and setting[key] is not None and short not in seen:
            seen.add(short)
            parts.append(f"{short}={setting[key]}")
    more = f", +{len(parts) - _MAX_LABEL_PARTS} more" if len(parts) > _MAX_LABEL_PARTS else ""
    return ", ".join(parts[:_MAX_LABEL_PARTS]) + more


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """Labels cut short may coincide: add the first run's name to those."""
    labels = [g.label for g in groups]
    return [g if labels.count(g.label) == 1 else Group(f"{g.label} ({g.runs[0].name})", g.runs) for g in groups]
