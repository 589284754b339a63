"""The settings of a run as flat, plain values, saved in checkpoints and compared at a resume."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.measuring import unwrap
from hessianflow.training.model_state import group_names

_PLAIN = (int, float, str, bool, type(None))
_OF_CHECKPOINT = ("optimizer.", "scheduler.")
"""Settings that a resumed run takes from the saved states of optimizer and scheduler."""


def flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public entries that are numbers, text or lists of these, with keys "name.key"."""
    plain = {key: _plain(value) for key, value in values.items() if not key.startswith("_")}
    return {f"{name}.{key}": value for key, value in plain.items() if _is_plain(value)}


def of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options of every parameter group, the learning rate included."""
    options: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = "optimizer"
        if len(optimizer.param_groups) > 1:
            name = f"optimizer.group {number}"
        options |= {f"{name}.{key}": value for key, value in _plain_options(group).items()}
    return options


def split_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return which parameters are stepped with which options; {} for those in one group."""
    if len(optimizer.param_groups) == 1:
        return {}
    named = group_names(unwrap(model), optimizer)
    groups = [
        {**_plain_options(group), "parameters": names}
        for names, group in zip(named, optimizer.param_groups, strict=True)
    ]
    return {"parameter_groups": groups}


def of_controller(controller: object) -> dict[str, Any]:
    """Return the public attributes of a controller, such as the cap on the batch size."""
    return flat("controller", getattr(controller, "__dict__", {}))


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return a message about a run that is resumed with other settings; empty where none differ."""
    changed = [key for key in own if key in saved and saved[key] != own[key]]
    kept = [key for key in changed if key.startswith(_OF_CHECKPOINT)]
    new = [f"{k} {own[k]} ({saved[k]} in the checkpoint)" for k in changed if k not in kept]
    old = [f"{k} {saved[k]} (this run was built with {own[k]})" for k in kept]
    parts: list[str] = []
    if new:
        parts.append(f"in force from here on: {', '.join(new)}")
    if old:
        parts.append(f"of the checkpoint, and still in force: {', '.join(old)}")
    if not parts:
        return ""
    return f"resumed with other settings: {'; '.join(parts)}"


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain options of a parameter group, but for what schedules leave in it."""
    own = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {key.removeprefix("."): value for key, value in flat("", own).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
