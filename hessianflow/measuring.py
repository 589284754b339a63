"""Measure a model and leave no trace on it: the one context manager that curvature, attacks and evaluation share."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.interfaces import NormMode

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind DataParallel, DistributedDataParallel or `torch.compile`, however nested.

    Second derivatives do not go through compiled graphs, and products must not fire the hooks that reduce gradients.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def measuring(model: nn.Module, norm_mode: NormMode = "eval") -> Iterator[nn.Module]:
    """Run the unwrapped model in evaluation mode with gradients enabled, then put everything back.

    Afterwards train/eval flags, buffers, `requires_grad` and the states of the random generators (torch CPU and the
    model's CUDA device, NumPy, Python) are as found, also when the body raises. `.grad` is never touched, provided the
    body differentiates with `torch.autograd.grad` or `torch.func`.

    Args:
        model: the model, wrapped or not.
        norm_mode: "eval": batch normalisation uses its running statistics. "batch": it uses those of the batch that is
            forwarded; the running ones are neither read nor moved. Everything else (dropout) is in evaluation mode in
            both cases.

    Yields:
        The unwrapped model.
    """
    inner = unwrap(model)
    modules = [(m, m.training, getattr(m, "track_running_stats", None)) for m in inner.modules()]
    # Versions tell whether a buffer was written to; restoring one that was not would invalidate graphs that saved it.
    buffers = [
        (m, name, b, _version(b), b.detach().clone())
        for m in inner.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    trainable = [(p, p.requires_grad) for p in inner.parameters()]
    generators = _generator_states(inner)
    try:
        _set_evaluation(inner, norm_mode)
        with torch.inference_mode(False), torch.enable_grad():
            yield inner
    finally:
        for module, training, tracks in modules:
            module.training = training
            if tracks is not None:
                module.track_running_stats = tracks
        for module, name, buffer, version, value in buffers:
            module._buffers[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        _restore_generators(generators)


def _version(tensor: Tensor) -> int:
    # A tensor made in inference mode keeps no version, and cannot be written to where gradients are on.
    return -1 if tensor.is_inference() else tensor._version


def _set_evaluation(model: nn.Module, norm_mode: NormMode) -> None:
    # Set flags directly: an overridden train() of the user's may do more than set them.
    for module in model.modules():
        module.training = False
        if norm_mode == "batch" and isinstance(module, _BATCH_NORM):
            # In training mode without tracking, the layer normalises by the batch and writes to no buffer.
            module.training = True
            module.track_running_stats = False


def _generator_states(model: nn.Module) -> tuple[Tensor, dict[torch.device, Tensor], Any, Any]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _restore_generators(states: tuple[Tensor, dict[torch.device, Tensor], Any, Any]) -> None:
    cpu, cuda, numpy_state, python_state = states
    torch.set_rng_state(cpu)
    for device, state in cuda.items():
        torch.cuda.set_rng_state(state, device)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
