"""Measure a model and leave no trace on it: the one context manager that curvature, attacks and
evaluation share."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessianflow.interfaces import HessianFlowError, NormMode

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module behind DataParallel, DistributedDataParallel or `torch.compile`, however
    nested.

    Second derivatives do not go through compiled graphs, and products must not fire the hooks that
    reduce gradients.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_differentiable(model: nn.Module) -> None:
    """Refuse a model whose weights were made in inference mode: torch lets no gradient through
    them.

    Raises:
        HessianFlowError: with the name of the first such weight.
    """
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_inference():
            raise HessianFlowError(
                f"the parameter {name!r} was made within torch.inference_mode() and cannot be"
                " differentiated; build the model outside of it, or load its state dict into one"
                " that was"
            )


@contextmanager
def measuring(model: nn.Module, norm_mode: NormMode = "eval") -> Iterator[nn.Module]:
    """Run the unwrapped model in evaluation mode with gradients enabled, then put everything back.

    Afterwards train/eval flags, buffers, `requires_grad` and the states of the random generators
    (torch CPU and the model's CUDA device, NumPy, Python) are as found, also when the body raises.
    `.grad` is never touched, provided the body differentiates with `torch.autograd.grad` or
    `torch.func`.

    Args:
        model: the model, wrapped or not.
        norm_mode: "eval": batch normalisation uses its running statistics. "batch": it uses those
            of the batch that is forwarded; the running ones are neither read nor moved. Everything
            else (dropout) is in evaluation mode in both cases.

    Yields:
        The unwrapped model.
    """
    inner = unwrap(model)
    modules = list(inner.modules())
    modes = [(m, m.training, m.__dict__.get("track_running_stats")) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules]
    copies = _copies(b for _, found in buffers for b in found.values() if b is not None)
    trainable = [
        (p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None
    ]
    generators = _generator_states({p.device for p, _ in trainable if p.device.type == "cuda"})
    try:
        _set_evaluation(modules, norm_mode)
        with torch.inference_mode(False), torch.enable_grad():
            yield inner
    finally:
        for module, training, tracks in modes:
            _set(module, "training", training)
            if tracks is not None:
                _set(module, "track_running_stats", tracks)
        for module, found in buffers:
            for name in module._buffers.keys() - found.keys():
                del module._buffers[name]
            for name, buffer in found.items():
                if name not in module._buffers or module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        for group, versions, flat in copies:
            _put_back(group, versions, flat)
        for parameter, flag in trainable:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        _restore_generators(generators)


_Copy = tuple[list[Tensor], list[int], Tensor]


def _copies(buffers: Iterable[Tensor]) -> list[_Copy]:
    """Tensors of one type and device, their versions, and all their values in one: few kernels for
    many buffers."""
    groups: dict[Any, list[Tensor]] = {}
    for buffer in buffers:
        strided = buffer.layout == torch.strided
        groups.setdefault((buffer.dtype, buffer.device) if strided else id(buffer), []).append(
            buffer
        )
    with torch.no_grad():
        return [
            (
                (group, [_version(b) for b in group], torch.cat([b.reshape(-1) for b in group]))
                if group[0].layout == torch.strided
                else (group, [_version(group[0])], group[0].clone())
            )
            for group in groups.values()
        ]


def _put_back(group: list[Tensor], versions: list[int], flat: Tensor) -> None:
    # Writing to a buffer that nobody wrote to would invalidate graphs that saved it.
    if [_version(b) for b in group] == versions:
        return
    strided = flat.layout == torch.strided
    values = torch.split(flat, [b.numel() for b in group]) if strided else (flat,)
    with torch.no_grad():
        for buffer, version, value in zip(group, versions, values, strict=True):
            if _version(buffer) != version:
                buffer.copy_(value.view(buffer.shape) if strided else value)


def _set(module: nn.Module, name: str, value: bool) -> None:
    # This runs at every attacked step, and nn.Module's own way to set an attribute is slow;
    # scripted modules need it.
    if name in module.__dict__:
        module.__dict__[name] = value
    else:
        setattr(module, name, value)


def _version(tensor: Tensor) -> int:
    # A tensor made in inference mode keeps no version, and cannot be written to where gradients are
    # on.
    return -1 if tensor.is_inference() else tensor._version


def _set_evaluation(modules: list[nn.Module], norm_mode: NormMode) -> None:
    # Set flags directly: an overridden train() of the user's may do more than set them.
    for module in modules:
        _set(module, "training", False)
        if norm_mode == "batch" and isinstance(module, _BATCH_NORM):
            # In training mode without tracking, the layer normalises by the batch and writes to no
            # buffer.
            _set(module, "training", True)
            _set(module, "track_running_stats", False)


def _generator_states(
    devices: set[torch.device],
) -> tuple[Tensor, dict[torch.device, Tensor], Any, Any]:
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _restore_generators(states: tuple[Tensor, dict[torch.device, Tensor], Any, Any]) -> None:
    cpu, cuda, numpy_state, python_state = states
    torch.set_rng_state(cpu)
    for device, state in cuda.items():
        torch.cuda.set_rng_state(state, device)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
