"""The settings of a run as flat, plain values, saved with every checkpoint.

After a resume they show which settings are in force.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_PLAIN = (int, float, str, bool, type(None))
_OF_CHECKPOINT = ("optimizer.", "scheduler.")
"""Settings that come from the saved states of optimizer and scheduler, whatever this run was built
with."""


def flat(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public entries that are numbers, text or lists of them, keyed "name.key"."""
    plain = {key: _plain(value) for key, value in values.items() if not key.startswith("_")}
    return {f"{name}.{key}": value for key, value in plain.items() if _is_plain(value)}


def of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options of every parameter group, the learning rate included."""
    found: dict[str, Any] = {}
    several = len(optimizer.param_groups) > 1
    for number, group in enumerate(optimizer.param_groups):
        name = f"optimizer.group {number}" if several else "optimizer"
        found |= flat(
            name,
            {key: value for key, value in group.items() if key not in ("params", "initial_lr")},
        )
    return found


def of_controller(controller: object) -> dict[str, Any]:
    """Return the public attributes of a controller, such as the cap on the batch size."""
    return flat("controller", vars(controller)) if hasattr(controller, "__dict__") else {}


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return a message about a run that is resumed with other settings; empty where none differ."""
    changed = [key for key in own if key in saved and saved[key] != own[key]]
    kept = [key for key in changed if key.startswith(_OF_CHECKPOINT)]
    parts = []
    if len(kept) < len(changed):
        new = [
            f"{key} {own[key]} ({saved[key]} in the checkpoint)"
            for key in changed
            if key not in kept
        ]
        parts.append(f"in force from here on: {_listed(new)}")
    if kept:
        old = [f"{key} {saved[key]} (this run was built with {own[key]})" for key in kept]
        parts.append(f"of the checkpoint, and still in force: {_listed(old)}")
    return f"resumed with other settings: {'; '.join(parts)}" if parts else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    return (
        all(_is_plain(item) for item in value)
        if isinstance(value, list)
        else isinstance(value, _PLAIN)
    )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
