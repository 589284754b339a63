"""The translation of settings from before options belonged to their methods."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["is_older", "moved", "upgrade"]

_Convert = Callable[[Any], Any]
_WRAPPED = ("sam",)


def _same(value: Any) -> Any:
    return value


def _or_never(value: Any) -> Any:
    """Return an option that 0 used to switch off, and null does today."""
    return value or None


_MOVED: Mapping[str, tuple[tuple[str, str, str, _Convert], ...]] = {
    "momentum": tuple(("optimizer", name, "momentum", _same) for name in ("sgd", "lars", "clars")),
    "weight_decay": tuple(
        ("optimizer", name, "weight_decay", _same)
        for name in ("sgd", "adam", "adamw", "lars", "clars", "lamb")
    ),
    "trust_coefficient": tuple(
        ("optimizer", name, "trust_coefficient", _same) for name in ("lars", "clars")
    ),
    "milestones": (
        ("schedule", "multistep", "milestones", _same),
        ("controller", "grow-instead-of-decay", "milestones", _same),
    ),
    "lr_decay": (
        ("schedule", "multistep", "lr_decay", _same),
        ("controller", "grow-instead-of-decay", "decay_factor", lambda value: 1 / value),
    ),
    "decay_from": (
        ("schedule", "cooldown", "decay_from", _same),
        ("controller", "timed", "decay_from", _same),
    ),
    "warmup_epochs": (("controller", "warmup", "warmup_epochs", _same),),
    "decay_factor": tuple(("controller", name, "decay_factor", _same) for name in ("absa", "abs")),
    "growth_factor": tuple(
        ("controller", name, "growth_factor", _same) for name in ("absa", "abs", "adabatch")
    ),
    "patience": tuple(("controller", name, "patience", _or_never) for name in ("absa", "abs")),
    "share_decay": (("controller", "absa", "share_decay", _same),),
    "every_epochs": (("controller", "adabatch", "every_epochs", _same),),
    "edge_share": (("controller", "critical", "edge_share", _or_never),),
    "loss_power": (("controller", "critical", "loss_power", _or_never),),
    "excess_power": (("controller", "critical", "excess_power", _same),),
    "stages": (("controller", "timed", "stages", _same),),
    "adversarial_share": tuple(
        ("adversary", name, "share", _same) for name in ("fgsm", "pgd", "conadv", "reuse")
    ),
    "eps": (
        *(("adversary", name, "eps", _same) for name in ("fgsm", "pgd", "reuse")),
        ("adversary", "conadv", "attack.eps", _same),
    ),
    "staleness": (("adversary", "conadv", "staleness", _same),),
    "conadv_attack": (("adversary", "conadv", "attack.name", _same),),
    "attack_runner": (("adversary", "conadv", "runner.name", _same),),
    "combine": (("adversary", "conadv", "combine", _same),),
    **{
        name: (("controller", "dual-batch", name, _same),)
        for name in (
            "workers",
            "small_workers",
            "extra_time",
            "slope",
            "intercept",
            "min_small_batch_size",
            "server",
            "synchrony",
        )
    },
}
"""Where each setting went: kind, method, option, and how its value is spelled there."""
_GONE: Mapping[str, tuple[str, str, str]] = {
    "momentum_correction": ("optimizer", "lars", "form"),
    "sam_rho": ("optimizer", "sam", "rho"),
}
"""Settings that became another choice of the method: what they are part of today."""
_OLDER = frozenset(_MOVED) - {"warmup_epochs"} | set(_GONE)


def moved(name: str) -> list[tuple[str, str, str]]:
    """Return kind, method and option that an older setting became; none for another name."""
    found = [
        (kind, method, option.removesuffix(".name"))
        for kind, method, option, _ in _MOVED.get(name, ())
    ]
    return [*found, _GONE[name]] if name in _GONE else found


def is_older(settings: Mapping[str, Any]) -> bool:
    """Return whether settings have names from before options belonged to their methods."""
    return bool(_OLDER & settings.keys())


def upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names of today.

    Options of methods that were not chosen had no effect and are left out.

    Args:
        settings: Settings, perhaps not all, of a file, a recorded run or a row of results.
    """
    if not is_older(settings):
        return dict(settings)
    kept = {name: value for name, value in settings.items() if name not in _OLDER}
    methods = _methods(settings)
    for name, places in _MOVED.items():
        value = settings.get(name)
        for kind, method, option, convert in places:
            if methods.get(kind, {}).get("name") == method and value is not None:
                _put(methods[kind], option, convert(value))
    if methods.get("controller", {}).get("name") == "warmup":
        kept.pop("warmup_epochs", None)
        if not methods["controller"].get("warmup_epochs"):
            methods["controller"].pop("warmup_epochs", None)
    if settings.get("momentum_correction"):
        methods["optimizer"]["form"] = "outside"
    if settings.get("sam_rho"):
        methods["optimizer"] = {
            "name": "sam",
            "rho": settings["sam_rho"],
            "base": methods["optimizer"],
        }
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
    schedule = settings.get("schedule")
    if schedule is None:
        own = {"critical": "cooldown", **dict.fromkeys(_WITHOUT_SCHEDULE, "constant")}
        schedule = own.get(controller, "multistep")
    chosen = {
        "controller": controller,
        "schedule": schedule,
        "adversary": settings.get("adversary", "fgsm"),
        "optimizer": settings.get("optimizer", "sgd"),
    }
    return {kind: {"name": name} for kind, name in chosen.items()}


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
