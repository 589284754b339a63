"""The settings that have an effect only under others, or contradict them, and their refusal.

A setting that is given but ignored is a mistake, either in that setting or in the choice that it
was meant for. Bounds on growth (`max_batch_size`) are not listed, because they always hold.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hessianflow.bounds import option, shown
from hessianflow.data.datasets import DATA_SETS, data_set
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class AllBut:
    """Every choice but the ones named."""

    names: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value not in self.names


Values = tuple[Any, ...] | AllBut
Case = Mapping[str, Values]
"""Values of other settings that must all hold."""

_ONE_TRAINER: Case = {"controller": AllBut(("dual-batch",))}
_MEASURED: Case = {"curvature": ("epoch", "needed"), **_ONE_TRAINER}
_SAVED: Case = {**_ONE_TRAINER, "elastic": (False,)}
_RESOLUTION: Case = {"resolution": ("cyclic", "once", "uniform")}
_ELASTIC: Case = {"elastic": (True,)}
_IMAGES: Case = {"data": tuple(name for name, one in DATA_SETS.items() if not one.is_text)}
_TEXT: Case = {"data": tuple(name for name, one in DATA_SETS.items() if one.is_text)}
_FILES: Case = {"data": tuple(name for name, one in DATA_SETS.items() if one.read is None)}
_BUNDLED = tuple(name for name, one in DATA_SETS.items() if not one.needs_files)

EFFECTIVE: Mapping[str, tuple[Case, ...]] = {
    "data_dir": ({"data": AllBut(_BUNDLED)},),
    "loader_workers": (_FILES,),
    "image_size": (_FILES,),
    "block_length": (_TEXT,),
    "channels_last": (_IMAGES,),
    "resolution": (_IMAGES,),
    "epoch_parts": ({**_SAVED, "resolution": AllBut(("cyclic", "once", "uniform"))},),
    "max_lr_factor": ({"lr_rule": ("linear", "sqrt", "none")},),
    "overfitting_alarm": ({**_IMAGES, **_ONE_TRAINER},),
    "alarm_eps": ({"overfitting_alarm": (True,), **_ONE_TRAINER},),
    "input_curvature": ({**_IMAGES, **_ONE_TRAINER},),
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
"""The cases of a setting, one of which must hold for it to have an effect. A setting that is not
listed always has one, and so has every option of a method."""
_WAYS_OUT: Mapping[str, str] = {
    "data_dir": ": name the data set that is there with --data",
    "min_workers": ": add --elastic",
    "max_workers": ": add --elastic",
}
"""The way out for a setting, if it is not to leave the setting out."""
_NOT_ELASTIC = {"adversary": "conadv", "controller": "dual-batch", "on_divergence": "rollback"}
"""Settings that do not work in an elastic run: they keep batches ready, have workers of their own,
or go back to a checkpoint file."""


def check_effects(settings: Any, names: Iterable[str]) -> None:
    """Refuse those of `names` that have no effect; the error names the choices they belong to.

    Values that switch something off (0, false, none, off) pass, because it is off anyway. The
    settings that cases name are resolved.
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
    """Return the settings of a case that do not have the values it asks for."""
    return [name for name, values in case.items() if _value(settings, name) not in values]


def _value(settings: Any, name: str) -> Any:
    """Return the value of a setting, the name of a method, or the value of a method's option.

    An option is named with its method, as in "controller.server".
    """
    setting, _, option_name = name.partition(".")
    value = getattr(settings, setting)
    if option_name:
        return value.options.get(option_name)
    return getattr(value, "name", value)


def _belongs(settings: Any, name: str) -> str:
    """Return a phrase about an ignored setting, from the first setting that fails each case."""
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
    """Return the values as "a", "a or b", or "a, b or c"."""
    *first, last = map(str, values)
    if not first:
        return last
    return f"{', '.join(first)} or {last}"


def _word(value: Any) -> str:
    """Return a value as the command line spells it."""
    if isinstance(value, str):
        return value
    return shown(value)


def check_together(config: Any) -> None:
    """Refuse settings that contradict each other, resolved or not; None stands for an open one."""
    _check_sizes(config)
    _check_resolution(config)
    _check_workers(config)


def check_resolved(config: Any) -> None:
    """Refuse resolved settings that contradict each other."""
    if data_set(config.data).is_text:
        _check_text(config)
    if config.max_lr_factor is not None and config.lr_rule is None:
        raise HessianFlowError(f"--max-lr-factor {config.max_lr_factor:g} needs --lr-rule")
    staleness = config.adversary.options.get("staleness", 0)
    if config.dropouts is not None and staleness > 0:
        raise HessianFlowError(
            "--dropouts needs --adversary.staleness 0: dropout is set when a batch is drawn, which"
            f" is too early with staleness {staleness}"
        )
    sizes = [size for _, size in config.controller.options.get("stages") or ()]
    if max(sizes, default=0) > config.max_batch_size:
        raise HessianFlowError(
            f"--controller.stages reach {max(sizes)}, above --max-batch-size"
            f" {config.max_batch_size}: raise it"
        )


def _check_text(config: Any) -> None:
    """Refuse methods that resize inputs or change them slightly, which bytes do not allow."""
    if config.controller.name == "dual-batch":
        raise HessianFlowError(
            f"--controller dual-batch trains on images of several sizes, but --data {config.data}"
            " is text: use another controller"
        )
    check_effects(config, ("overfitting_alarm", "input_curvature"))
    if config.adversary.name != "none":
        raise HessianFlowError(
            f"--adversary {config.adversary.name} changes inputs slightly, but those of --data"
            f" {config.data} are bytes: leave it out"
        )


def _check_sizes(config: Any) -> None:
    cap = config.max_batch_size
    if config.batch_size is not None and cap is not None and cap < config.batch_size:
        raise HessianFlowError(
            f"--max-batch-size {cap} is below --batch-size {config.batch_size}: raise the cap"
        )
    side = config.image_size
    if side is not None and config.resolutions and config.resolutions[-1] != side:
        raise HessianFlowError(
            f"--resolutions must end with --image-size {side}, got {list(config.resolutions)}"
        )


def _check_resolution(config: Any) -> None:
    sizes = config.resolutions
    for name in ("resolution_batch_sizes", "dropouts"):
        values = getattr(config, name)
        if values is not None and sizes is not None and len(values) != len(sizes):
            raise HessianFlowError(
                f"{option(name)} must hold one value for each of the"
                f" {len(sizes)} resolutions, got {len(values)}"
            )
    if sizes is not None and (not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes))):
        raise HessianFlowError(
            f"--resolutions must be one or more increasing sizes in pixels, got {list(sizes)}"
        )
    batches = config.resolution_batch_sizes
    if batches is not None and min(batches, default=0) < 1:
        raise HessianFlowError(f"--resolution-batch-sizes must be 1 or more, got {list(batches)}")
    if config.dropouts is not None and not all(0 <= value < 1 for value in config.dropouts):
        raise HessianFlowError(f"--dropouts must lie in [0, 1), got {list(config.dropouts)}")


def _check_workers(config: Any) -> None:
    low = config.min_workers or 1
    high = config.max_workers or 8
    if low > high:
        raise HessianFlowError(f"--max-workers {high} is below --min-workers {low}: raise it")
    if not config.elastic:
        return
    for name, value in _NOT_ELASTIC.items():
        setting = getattr(config, name)
        if getattr(setting, "name", setting) == value:
            raise HessianFlowError(
                f"--elastic does not go with {option(name)} {value}: leave one out"
            )
