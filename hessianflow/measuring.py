"""The context manager in which curvature, attacks and evaluation leave no trace on a model."""

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
    """Return the module inside any DataParallel, DistributedDataParallel and `torch.compile`.

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
    """Refuse a model whose weights were made in inference mode, which have no gradients."""
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

    Train/eval flags, buffers, `requires_grad` and the states of the random generators (torch CPU
    and the model's CUDA device, NumPy, Python) are restored, also when the body raises. `.grad`
    does not change, provided the body differentiates with `torch.autograd.grad` or `torch.func`.

    Args:
        model: the model, wrapped or not.
        norm_mode: "eval": batch normalisation uses its running statistics. "batch": it uses those
            of the batch that is forwarded, and the running ones are neither read nor moved.
            Everything else (dropout) is in evaluation mode in both cases.

    Yields:
        The unwrapped model.
    """
    inner = unwrap(model)
    modules = list(inner.modules())
    modes = [(m, m.training, m.__dict__.get("track_running_stats")) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules]
    copies = _copies(b for _, held in buffers for b in held.values() if b is not None)
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
        for module, held in buffers:
            for name in module._buffers.keys() - held.keys():
                del module._buffers[name]
            for name, buffer in held.items():
                if name not in module._buffers or module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        for group, versions, values in copies:
            _put_back(group, versions, values)
        for parameter, flag in trainable:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        _restore_generators(generators)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the states of the random generators of torch (CPU), NumPy and Python back afterwards."""
    states = _generator_states(set())
    try:
        yield
    finally:
        _restore_generators(states)


_Copy = tuple[list[Tensor], list[int], Tensor]


def _copies(buffers: Iterable[Tensor]) -> list[_Copy]:
    """Return groups of buffers, their versions, and their values in one tensor for each group.

    A group holds the buffers of one type and device, so that few kernels copy many buffers.
    """
    groups: dict[Any, list[Tensor]] = {}
    for buffer in buffers:
        key: Any = (buffer.dtype, buffer.device)
        if buffer.layout != torch.strided:
            key = id(buffer)
        groups.setdefault(key, []).append(buffer)
    with torch.no_grad():
        return [(group, [_version(b) for b in group], _values(group)) for group in groups.values()]


def _values(group: list[Tensor]) -> Tensor:
    if group[0].layout != torch.strided:
        return group[0].clone()
    return torch.cat([b.reshape(-1) for b in group])


def _put_back(group: list[Tensor], versions: list[int], values: Tensor) -> None:
    # Writing to a buffer that nobody wrote to would invalidate graphs that saved it.
    if [_version(b) for b in group] == versions:
        return
    pieces: Iterable[Tensor] = [values]
    if values.layout == torch.strided:
        flat = torch.split(values, [b.numel() for b in group])
        pieces = [piece.view(b.shape) for piece, b in zip(flat, group, strict=True)]
    with torch.no_grad():
        for buffer, version, piece in zip(group, versions, pieces, strict=True):
            if _version(buffer) != version:
                buffer.copy_(piece)


def _set(module: nn.Module, name: str, value: bool) -> None:
    # nn.Module's own way to set an attribute, which scripted modules need, is too slow for every
    # attacked step.
    if name in module.__dict__:
        module.__dict__[name] = value
    else:
        setattr(module, name, value)


def _version(tensor: Tensor) -> int:
    # A tensor made in inference mode has no version, and cannot be written to with gradients on.
    if tensor.is_inference():
        return -1
    return tensor._version


def _set_evaluation(modules: list[nn.Module], norm_mode: NormMode) -> None:
    # The flags are set directly, because a user's own train() may do more than set them.
    for module in modules:
        _set(module, "training", False)
        if norm_mode == "batch" and isinstance(module, _BATCH_NORM):
            # In training mode without tracking, a layer normalises by the batch and writes to no
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
