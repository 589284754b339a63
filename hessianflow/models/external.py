"""Networks from elsewhere: the user's own functions by import path, timm and torchvision where they are installed."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from hessianflow.interfaces import HessianFlowError


def is_external(name: str) -> bool:
    """Whether `name` is "package.module:function", "timm/NAME" or "torchvision/NAME"."""
    return ":" in name or name.startswith(("timm/", "torchvision/"))


def build(name: str, *, num_classes: int, input_size: int, in_channels: int) -> nn.Module:
    """Build a network that is not ours.

    A function given by import path is called with those of `num_classes`, `input_size` and `in_channels` that its
    signature names.

    Raises:
        HessianFlowError: the module or function cannot be imported, the function needs other arguments, or what it
            returns is no `torch.nn.Module`.
    """
    if name.startswith("timm/"):
        create = _attribute(name, "timm", "create_model")
        return _from_library(name, create, num_classes=num_classes, in_chans=in_channels)
    if name.startswith("torchvision/"):
        get_model = _attribute(name, "torchvision.models", "get_model")
        return _from_library(name, get_model, weights=None, num_classes=num_classes)
    module, _, function = name.partition(":")
    factory = _attribute(name, module, function)
    return _checked(name, factory(**_taken(name, factory, num_classes, input_size, in_channels)))


def _taken(
    name: str, factory: Callable[..., Any], num_classes: int, input_size: int, in_channels: int
) -> dict[str, int]:
    """What of our arguments the function takes."""
    offered = {"num_classes": num_classes, "input_size": input_size, "in_channels": in_channels}
    taken = {key: value for key, value in offered.items() if key in inspect.signature(factory).parameters}
    try:
        inspect.signature(factory).bind(**taken)
    except TypeError as error:
        raise HessianFlowError(
            f"model {name!r} cannot be called with {', '.join(offered)} alone ({error}): give the others defaults"
        ) from None
    return taken


def _from_library(name: str, create: Callable[..., Any], **options: Any) -> nn.Module:
    library, _, model = name.partition("/")
    try:
        return _checked(name, create(model, **options))
    except (RuntimeError, ValueError) as error:
        raise HessianFlowError(f"{library} cannot build {model!r}: {_first_line(error)}") from error


def _attribute(name: str, module: str, attribute: str) -> Callable[..., Any]:
    try:
        found = getattr(import_module(module), attribute, None) if module and attribute else None
    # A broken torchvision raises RuntimeError; whatever the import raises is the user's answer.
    except Exception as error:
        library, slash, _ = name.partition("/")
        way_out = f"; pip install {library}" if slash and isinstance(error, ModuleNotFoundError) else ""
        raise HessianFlowError(f"model {name!r}: importing {module!r} failed: {_first_line(error)}{way_out}") from error
    if not callable(found):
        raise HessianFlowError(
            f"model {name!r}: {module!r} has no function {attribute!r}; write it as package.module:function"
        )
    return found  # type: ignore[no-any-return]


def _checked(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise HessianFlowError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
