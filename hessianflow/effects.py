"""Which settings have an effect under which others: one table, and the refusal of ignored settings.

A setting that is given but ignored is a mistake: either in the option, or in the choice that it was
meant for. Bounds on growth (`max_batch_size`) are not listed: they hold even where nothing grows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hessianflow.bounds import option, shown
from hessianflow.data.datasets import DATA_SETS
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class Above:
    """Stands for all numbers above a bound."""

    bound: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and value > self.bound


@dataclass(frozen=True)
class AllBut:
    """Stands for every choice but the ones named."""

    names: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value not in self.names


Values = tuple[Any, ...] | Above | AllBut
Case = Mapping[str, Values]
"""Values of other settings that must all hold."""

_ONE_TRAINER: Case = {"controller": AllBut(("dual-batch",))}
_MEASURED: Case = {"curvature": ("epoch", "needed"), **_ONE_TRAINER}
_SAVED: Case = {**_ONE_TRAINER, "elastic": (False,)}
_RESOLUTION: Case = {"resolution": ("cyclic", "once", "uniform")}
_ELASTIC: Case = {"elastic": (True,)}
_FILES: Case = {"data": tuple(name for name, one in DATA_SETS.items() if one.read is None)}
_BUNDLED = tuple(name for name, one in DATA_SETS.items() if not one.needs_files)

EFFECTIVE: Mapping[str, tuple[Case, ...]] = {
    "data_dir": ({"data": AllBut(_BUNDLED)},),
    "loader_workers": (_FILES,),
    "image_size": (_FILES,),
    "max_lr_factor": ({"lr_rule": ("linear", "sqrt", "none")},),
    "overfitting_alarm": (_ONE_TRAINER,),
    "input_curvature": (_ONE_TRAINER,),
    "curvature": (_ONE_TRAINER,),
    "probe_examples": (_MEASURED,),
    "probe_tolerance": (_MEASURED, {"input_curvature": (True,), **_ONE_TRAINER}),
    "curvature_budget": (_MEASURED,),
    "norm_mode": (_MEASURED,),
    "norm_statistics": (_ONE_TRAINER,),
    "lr_rule": (_ONE_TRAINER,),
    "checkpoint_examples": (_SAVED,),
    "checkpoint_minutes": (_SAVED,),
    "on_divergence": (_ONE_TRAINER,),
    "max_rollbacks": ({"on_divergence": ("rollback",)},),
    "resolutions": (_RESOLUTION,),
    "resolution_batch_sizes": (_RESOLUTION,),
    "dropouts": (_RESOLUTION,),
    "ray_address": (_ELASTIC, {"controller": ("dual-batch",), "controller.server": ("ray",)}),
    "split_norm": ({"adversary": ("conadv",)},),
    "min_workers": (_ELASTIC,),
    "max_workers": (_ELASTIC,),
}
"""The cases of a setting, one of which must hold for it to have an effect; a setting that is not
listed always has one. Options of methods are not listed: a method has no options without effect."""
_WAYS_OUT: Mapping[str, str] = {
    "data_dir": ": name the data set that is there with --data",
    "min_workers": ": add --elastic",
    "max_workers": ": add --elastic",
}
"""The way out for a setting, where it is not simply to leave the setting out."""


def check_effects(settings: Any, names: Iterable[str]) -> None:
    """Refuse settings that have no effect under the others.

    Values that switch something off (0, false, none, off) pass: what they ask for holds anyway.

    Args:
        settings: an object with all settings; those that cases name are resolved.
        names: the settings that were given.

    Raises:
        HessianFlowError: naming the option and what it belongs to.
    """
    for name in names:
        if is_ignored(settings, name):
            way_out = _WAYS_OUT.get(name, ": leave it out")
            raise HessianFlowError(f"{option(name)} {_belongs(settings, name)}{way_out}")


def is_ignored(settings: Any, name: str) -> bool:
    """Return whether a setting has a value that has no effect under the others."""
    value = getattr(settings, name)
    if not value or value in ("none", "off"):
        return False
    cases = EFFECTIVE.get(name, ())
    return bool(cases) and all(_failing(settings, case) for case in cases)


def _failing(settings: Any, case: Case) -> list[str]:
    """Return the settings whose values are not those of the case."""
    return [name for name, values in case.items() if _value(settings, name) not in values]


def _value(settings: Any, name: str) -> Any:
    """Return the value of a setting: of a method its name, and of "controller.server" the option of
    the method."""
    setting, _, option_name = name.partition(".")
    value = getattr(settings, setting)
    if option_name:
        return value.options.get(option_name)
    return getattr(value, "name", value)


def _belongs(settings: Any, name: str) -> str:
    """Return what an ignored setting belongs to, in words, from the first setting at which each
    case fails."""
    parts = []
    for case in EFFECTIVE[name]:
        other = _failing(settings, case)[0]
        values = case[other]
        if _value(settings, other) is None and isinstance(values, tuple):
            return f"needs {option(other)} {_alternatives(values)}"
        if not isinstance(values, tuple):
            return f"does nothing with {option(other)} {_word(_value(settings, other))}"
        if values == (True,):
            parts.append(f"{option(other)} runs")
        elif values == (False,):
            return f"does nothing with {option(other)}"
        else:
            parts.append(f"{option(other)} {_alternatives(values)}")
    return f"is a setting of {' or of '.join(parts)}"


def _alternatives(values: tuple[Any, ...]) -> str:
    """Return the values in words: "a", "a or b", "a, b or c"."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _word(value: Any) -> str:
    """Return a value as the command line spells it."""
    return value if isinstance(value, str) else shown(value)
