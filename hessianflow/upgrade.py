"""The translation of settings from before options belonged to their methods."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["is_older", "moved", "upgrade"]

_Convert = Callable[[Any], Any]
_Place = tuple[str, str, str, _Convert]
_WRAPPED = ("sam",)


def _same(value: Any) -> Any:
    return value


def _or_never(value: Any) -> Any:
    """Return an option that 0 used to switch off, and null does today."""
    return value or None


def _to(kind: str, methods: str, option: str, convert: _Convert = _same) -> tuple[_Place, ...]:
    """Return the places of an option that several methods have."""
    return tuple((kind, method, option, convert) for method in methods.split())


_OF_DUAL_BATCH = (
    *("workers", "small_workers", "extra_time", "slope", "intercept"),
    *("min_small_batch_size", "server", "synchrony"),
)
_MOVED: Mapping[str, tuple[_Place, ...]] = {
    "momentum": _to("optimizer", "sgd lars clars", "momentum")
    + _to("controller", "critical", "momentum"),
    "weight_decay": _to("optimizer", "sgd adam adamw lars clars lamb", "weight_decay"),
    "trust_coefficient": _to("optimizer", "lars clars", "trust_coefficient"),
    "milestones": _to("schedule", "multistep", "milestones")
    + _to("controller", "grow-instead-of-decay", "milestones"),
    "lr_decay": _to("schedule", "multistep", "lr_decay")
    + _to("controller", "grow-instead-of-decay", "decay_factor", lambda value: 1 / value),
    "decay_from": _to("schedule", "cooldown", "decay_from")
    + _to("controller", "timed", "decay_from"),
    "warmup_epochs": _to("controller", "warmup", "warmup_epochs"),
    "decay_factor": _to("controller", "absa abs", "decay_factor"),
    "growth_factor": _to("controller", "absa abs adabatch", "growth_factor"),
    "patience": _to("controller", "absa abs", "patience", _or_never),
    "share_decay": _to("controller", "absa", "share_decay"),
    "every_epochs": _to("controller", "adabatch", "every_epochs"),
    "edge_share": _to("controller", "critical", "edge_share", _or_never),
    "loss_power": _to("controller", "critical", "loss_power", _or_never),
    "excess_power": _to("controller", "critical", "excess_power"),
    "stages": _to("controller", "timed", "stages"),
    "adversarial_share": _to("adversary", "fgsm pgd conadv reuse", "share"),
    "eps": (*_to("adversary", "fgsm pgd reuse", "eps"), *_to("adversary", "conadv", "attack.eps")),
    "staleness": _to("adversary", "conadv", "staleness"),
    "conadv_attack": _to("adversary", "conadv", "attack.name"),
    "attack_runner": _to("adversary", "conadv", "runner.name"),
    "combine": _to("adversary", "conadv", "combine"),
    **{name: _to("controller", "dual-batch", name) for name in _OF_DUAL_BATCH},
}
"""Where each setting went: kind, method, option, and how its value is spelled there."""
_GONE: Mapping[str, tuple[str, str, str]] = {
    "momentum_correction": ("optimizer", "lars", "form"),
    "sam_rho": ("optimizer", "sam", "rho"),
}
"""Settings that became another choice of a method, and the option that they are part of today."""
_OLDER = frozenset(_MOVED) - {"warmup_epochs"} | set(_GONE)


def moved(name: str) -> list[tuple[str, str, str]]:
    """Return the kind, method and option that an older setting became; [] for any other name."""
    if name in _GONE:
        return [_GONE[name]]
    return [
        (kind, method, option.removesuffix(".name"))
        for kind, method, option, _ in _MOVED.get(name, ())
    ]


def is_older(settings: Mapping[str, Any]) -> bool:
    """Return whether settings have names from before options belonged to their methods."""
    of_warmup = settings.get("controller") == "warmup" and "warmup_epochs" in settings
    return of_warmup or bool(_OLDER & settings.keys())


def upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, perhaps not all, under the names of today.

    Options of methods that were not chosen had no effect and are left out.
    """
    if not is_older(settings):
        return dict(settings)
    kept = {name: value for name, value in settings.items() if name not in _OLDER}
    methods = _methods(settings)
    for name, places in _MOVED.items():
        value = settings.get(name)
        for kind, method, option, convert in places:
            if methods.get(kind, {}).get("name") == method and value is not None:
                _put(methods[kind], option, _converted(value, convert))
    if methods.get("controller", {}).get("name") == "warmup":
        kept.pop("warmup_epochs", None)
        if not methods["controller"].get("warmup_epochs"):
            methods["controller"].pop("warmup_epochs", None)
    if settings.get("momentum_correction"):
        methods["optimizer"]["form"] = "outside"
    if settings.get("overfitting_alarm") in (True, "true") and settings.get("eps") is not None:
        kept["alarm_eps"] = settings["eps"]
    if settings.get("sam_rho"):
        base = methods["optimizer"]
        methods["optimizer"] = {"name": "sam", "rho": settings["sam_rho"], "base": base}
    if methods["controller"]["name"] in ("abs", "dual-batch"):
        methods["adversary"] = {"name": "none"}
    return kept | {
        kind: method for kind, method in methods.items() if _is_given(kind, method, settings)
    }


def _is_given(kind: str, method: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether the settings chose the method, or gave it an option."""
    return kind in settings or len(method) > 1 or method["name"] in _WRAPPED


def _methods(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the methods in force, with the defaults of the time for those that are not named."""
    controller = settings.get("controller", "absa")
    if isinstance(controller, Mapping):
        controller = controller.get("name")
    schedule = settings.get("schedule")
    if schedule is None:
        own = {"critical": "cooldown", **dict.fromkeys(_WITHOUT_SCHEDULE, "constant")}
        schedule = own.get(str(controller), "multistep")
    chosen = {
        "controller": settings.get("controller", "absa"),
        "schedule": schedule,
        "adversary": settings.get("adversary", "fgsm"),
        "optimizer": settings.get("optimizer", "sgd"),
    }
    return {kind: _as_method(value) for kind, value in chosen.items()}


def _as_method(value: Any) -> dict[str, Any]:
    """Return a method as a mapping; one that is already may stand beside older names."""
    if isinstance(value, Mapping):
        return {"name": None, **value}
    return {"name": value}


def _converted(value: Any, convert: _Convert) -> Any:
    """Return a value in its form of today; one that has none is left, to be refused where it is."""
    try:
        return convert(value)
    except (TypeError, ZeroDivisionError):
        return value


_WITHOUT_SCHEDULE = ("adabatch", "grow-instead-of-decay", "timed")


def _put(method: dict[str, Any], option: str, value: Any) -> None:
    """Set an option of a method, or an option of the method inside it."""
    outer, _, inner = option.partition(".")
    if not inner:
        method[outer] = value
        return
    nested = method.setdefault(outer, {})
    nested[inner] = value
    if outer == "attack":
        nested.setdefault("name", "fgsm")
