"""The states of generators and models as plain data, of which checkpoints are made."""

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.states import check_finite, model_fault


def generator_states() -> dict[str, Any]:
    """Return the global random generators as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = dict(numpy_state["state"])
    for name, value in inner.items():
        if isinstance(value, np.ndarray):
            inner[name] = value.tolist()
    kind, words, gauss = random.getstate()
    cuda: list[torch.Tensor] = []
    if torch.cuda.is_available():
        cuda = torch.cuda.get_rng_state_all()
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": {**numpy_state, "state": inner},
        "python": [kind, list(words), gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Set the global random generators back to `generator_states()`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    kind, words, gauss = states["python"]
    random.setstate((kind, tuple(words), gauss))


def plain(value: Any) -> Any:
    """Return the same structure with NumPy scalars, which no checkpoint may hold, as numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {plain(key): plain(item) for key, item in value.items()}
        if type(value) in (OrderedDict, Counter):
            return type(value)(items)
        return items
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(plain(item) for item in value)
    return value


def load_model(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load weights and buffers.

    Raises:
        HessianFlowError: names, shapes or types differ; the message names the first that does.
        DamagedStateError: a trained weight is not finite.
    """
    fault = model_fault(model, state)
    if fault is not None:
        raise HessianFlowError(f"{source} is of another model: {fault}")
    check_finite(model, state)
    model.load_state_dict(state)
