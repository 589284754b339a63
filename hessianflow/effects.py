"""Which settings have an effect under which others: one table, and the refusal of ignored settings.

A setting that is given but ignored is a mistake: either in the option, or in the choice that it was
meant for. Bounds on growth (`max_batch_size`) are not listed: they hold even where nothing grows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hessianflow.bounds import option, shown
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

_MEASURED: Case = {"curvature": ("epoch", "needed"), "controller": AllBut(("dual-batch",))}
_ATTACKED: Case = {"adversary": AllBut(("none",)), "controller": AllBut(("abs", "dual-batch"))}
_ONE_TRAINER: Case = {"controller": AllBut(("dual-batch",))}
_DUAL_BATCH: Case = {"controller": ("dual-batch",)}
_CONADV: Case = {"adversary": ("conadv",), "controller": AllBut(("abs", "dual-batch"))}
_MILESTONES: tuple[Case, ...] = (
    {"schedule": ("multistep",)},
    {"controller": ("grow-instead-of-decay",)},
)
_RESOLUTION: Case = {"resolution": ("cyclic", "once", "uniform")}
_FILES = ("imagenet", "folder")

EFFECTIVE: Mapping[str, tuple[Case, ...]] = {
    "data_dir": ({"data": AllBut(("digits", "fake"))},),
    "loader_workers": ({"data": _FILES},),
    "image_size": ({"data": _FILES},),
    "adversary": ({"adversarial_share": Above(0), "controller": AllBut(("abs", "dual-batch"))},),
    "adversarial_share": (_ATTACKED,),
    "eps": (_ATTACKED, {"overfitting_alarm": (True,)}),
    "share_decay": ({"controller": ("absa",), "adversary": AllBut(("none",))},),
    "momentum": (
        {"optimizer": ("sgd", "lars", "clars")},
        {"controller": ("critical",), "edge_share": Above(0)},
    ),
    "trust_coefficient": ({"optimizer": ("lars", "clars")},),
    "momentum_correction": ({"optimizer": ("lars",)},),
    "milestones": _MILESTONES,
    "lr_decay": _MILESTONES,
    "max_lr_factor": ({"lr_rule": ("linear", "sqrt", "none")},),
    "decay_factor": ({"controller": ("absa", "abs")},),
    "growth_factor": ({"controller": ("absa", "abs", "adabatch")},),
    "patience": ({"controller": ("absa", "abs")},),
    "every_epochs": ({"controller": ("adabatch",)},),
    "edge_share": ({"controller": ("critical",)},),
    "loss_power": ({"controller": ("critical",)},),
    "excess_power": (
        {"controller": ("critical",), "edge_share": Above(0), "loss_power": Above(0)},
    ),
    "stages": ({"controller": ("timed",)},),
    "decay_from": ({"schedule": ("cooldown",)}, {"controller": ("timed",)}),
    "overfitting_alarm": (_ONE_TRAINER,),
    "input_curvature": (_ONE_TRAINER,),
    "curvature": (_ONE_TRAINER,),
    "probe_examples": (_MEASURED,),
    "probe_tolerance": (_MEASURED, {"input_curvature": (True,), **_ONE_TRAINER}),
    "curvature_budget": (_MEASURED,),
    "norm_mode": (_MEASURED,),
    "norm_statistics": (_ONE_TRAINER,),
    "lr_rule": (_ONE_TRAINER,),
    "checkpoint_examples": ({**_ONE_TRAINER, "elastic": (False,)},),
    "checkpoint_minutes": ({**_ONE_TRAINER, "elastic": (False,)},),
    "on_divergence": (_ONE_TRAINER,),
    "max_rollbacks": ({"on_divergence": ("rollback",)},),
    "resolutions": (_RESOLUTION,),
    "resolution_batch_sizes": (_RESOLUTION,),
    "dropouts": (_RESOLUTION,),
    "workers": (_DUAL_BATCH,),
    "small_workers": (_DUAL_BATCH,),
    "extra_time": (_DUAL_BATCH,),
    "slope": (_DUAL_BATCH,),
    "intercept": (_DUAL_BATCH,),
    "min_small_batch_size": (_DUAL_BATCH,),
    "server": (_DUAL_BATCH,),
    "synchrony": (_DUAL_BATCH,),
    "ray_address": ({"elastic": (True,)}, {**_DUAL_BATCH, "server": ("ray",)}),
    "staleness": (_CONADV,),
    "conadv_attack": (_CONADV,),
    "attack_runner": (_CONADV,),
    "combine": (_CONADV,),
    "split_norm": (_CONADV,),
    "min_workers": ({"elastic": (True,)},),
    "max_workers": ({"elastic": (True,)},),
}
"""The cases of a setting, one of which must hold for it to have an effect; a setting that is not
listed always has one."""
_WAYS_OUT: Mapping[str, str] = {
    "workers": "; processes that load images are --loader-workers",
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
    return [name for name, values in case.items() if getattr(settings, name) not in values]


def _belongs(settings: Any, name: str) -> str:
    """Return what an ignored setting belongs to, in words, from the first setting at which each
    case fails."""
    parts = []
    for case in EFFECTIVE[name]:
        other = _failing(settings, case)[0]
        values = case[other]
        if getattr(settings, other) is None and isinstance(values, tuple):
            return f"needs {option(other)} {_alternatives(values)}"
        if not isinstance(values, tuple):
            return f"does nothing with {option(other)} {_word(getattr(settings, other))}"
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
