"""The plain data of which checkpoints are made: random generators, model, optimizer, settings."""

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.runs.optimizer_states import OtherGroupsError, in_order
from hessianflow.runs.states import check_finite, model_fault

_PLAIN = (int, float, str, bool, type(None))
_OF_CHECKPOINT = ("optimizer.", "scheduler.")
"""Settings that a resumed run takes from the saved states of optimizer and scheduler."""


def generator_states() -> dict[str, Any]:
    """Return the global random generators as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = dict(numpy_state["state"])
    for name, value in inner.items():
        if isinstance(value, np.ndarray):
            inner[name] = value.tolist()
    kind, words, gauss = random.getstate()
    cuda: list[Tensor] = []
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


class ModelState:
    """Captures and restores the weights and what goes with them; refuses the state of other models.

    Beside what the `state_dict` of model and optimizer hold, a resumed run needs the names of the
    parameters that are trained and of their groups, and of the modules in evaluation mode; the
    buffers that the first forward pass makes; those that are not persistent but were written to;
    and the parameters that only the optimizer holds.

    Wrappers of the model are looked through, and the groups of the optimizer are read again each
    time. The parameters of a loss that is a module are saved elsewhere.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss_fn: object) -> None:
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._saved_modules = [self._model]
        if isinstance(loss_fn, nn.Module):
            self._saved_modules.append(loss_fn)
        self._built_trainable = self._trainable()
        self._built_buffers = {
            name: (buffer, _version(buffer)) for name, buffer in self._model.named_buffers()
        }

    def capture(self) -> dict[str, Any]:
        """Return the weights and what goes with them, as tensors and plain values."""
        state = self._model.state_dict()
        buffers = dict(self._model.named_buffers())
        known = self._built_buffers
        own = {n: b for n, b in buffers.items() if n not in state}
        transient = {n: b for n, b in own.items() if self._is_new(n, b)}
        return {
            "model": state,
            "late_buffers": [n for n in buffers if n in state and n not in known],
            "transient_buffers": transient,
            "trainable": self._trainable(),
            "built_trainable": self._built_trainable,
            "evaluating": [n for n, part in self._model.named_modules() if not part.training],
            "groups": group_names(self._model, self._optimizer),
            "beside": [p.detach() for p in self._beside()],
        }

    def restore_model(self, state: Mapping[str, Any], source: str) -> None:
        """Restore the model, and give the optimizer the groups that were added during the run."""
        self._match_buffers(state, source)
        load_model(self._model, state["model"], source)
        for name, buffer in state["transient_buffers"].items():
            self._set_buffer(name, buffer, persistent=False)
        # Where the user has built the model with other layers frozen, that choice holds.
        if state["built_trainable"] == self._built_trainable:
            trainable = set(state["trainable"])
            for name, parameter in self._model.named_parameters():
                parameter.requires_grad_(name in trainable)
        evaluating = set(state["evaluating"])
        for name, module in self._model.named_modules():
            module.training = name not in evaluating
        self._add_groups(state["groups"])

    def in_own_order(self, state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """Return the saved state of the optimizer with its weights in this optimizer's order."""
        own = group_names(self._model, self._optimizer)
        try:
            return in_order(state["optimizer"], state["groups"], own)
        except OtherGroupsError as error:
            raise HessianFlowError(
                f"{source} has an optimizer with other parameter groups: {error}; build it with the"
                " same groups"
            ) from None

    def restore_beside(self, tensors: Sequence[Tensor], source: str) -> None:
        """Restore the parameters that only the optimizer holds; refuse other numbers or shapes."""
        own = self._beside()
        if [p.shape for p in own] != [t.shape for t in tensors]:
            raise HessianFlowError(
                f"{source} has {len(tensors)} parameters of shapes {[[*t.shape] for t in tensors]}"
                f" that the optimizer alone holds, this run has {[[*p.shape] for p in own]}: give"
                " it the same parameters"
            )
        with torch.no_grad():
            for parameter, tensor in zip(own, tensors, strict=True):
                parameter.copy_(tensor)

    def _trainable(self) -> list[str]:
        return [name for name, p in self._model.named_parameters() if p.requires_grad]

    def _beside(self) -> list[nn.Parameter]:
        known = {id(p) for module in self._saved_modules for p in module.parameters()}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [p for p in held if id(p) not in known]

    def _add_groups(self, groups: Sequence[Sequence[str]]) -> None:
        own = dict(self._model.named_parameters())
        for names in groups[len(self._optimizer.param_groups) :]:
            if all(name in own for name in names):
                self._optimizer.add_param_group({"params": [own[name] for name in names]})

    def _is_new(self, name: str, buffer: Tensor) -> bool:
        """Return whether a buffer was replaced, added or written to since the start."""
        built = self._built_buffers.get(name)
        return built is None or built[0] is not buffer or built[1] != _version(buffer)

    def _match_buffers(self, state: Mapping[str, Any], source: str) -> None:
        """Add the buffers that the saved model's first pass made, and remove those made since."""
        saved = state["model"]
        own = self._model.state_dict()
        for name in [name for name, _ in self._model.named_buffers()]:
            if name in own and name not in saved and name not in self._built_buffers:
                module, local = self._owner(name)
                del module._buffers[local]
        late = set(state["late_buffers"])
        for name in saved.keys() - own.keys():
            if name not in late:
                raise HessianFlowError(
                    f"{source} is of another model: only the checkpoint has {name!r} (if the model"
                    " makes it in its first forward pass, run it once on a batch before)"
                )
            self._set_buffer(name, saved[name], persistent=True)

    def _set_buffer(self, name: str, value: Tensor, *, persistent: bool) -> None:
        module, local = self._owner(name)
        held = module._buffers.get(local)
        device = next(self._model.parameters()).device
        if held is not None:
            device = held.device
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            with torch.no_grad():
                held.copy_(value)
        elif local in module._buffers:
            module._buffers[local] = value.to(device).clone()
        else:
            module.register_buffer(local, value.to(device).clone(), persistent=persistent)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, local = name.rpartition(".")
        return self._model.get_submodule(path), local


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group; "" for one outside the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _version(tensor: Tensor) -> int:
    if tensor.is_inference():
        return -1  # Tensors made in inference mode count no versions.
    return tensor._version


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
