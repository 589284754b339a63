"""Networks from elsewhere: user functions by import path, and timm and torchvision if installed."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.user_code import first_line, place_of, working_directory_first


def is_external(name: str) -> bool:
    """Return whether `name` is "package.module:function", "timm/NAME" or "torchvision/NAME"."""
    return ":" in name or name.startswith(("timm/", "torchvision/"))


def build(name: str, *, num_classes: int, input_size: int, in_channels: int) -> nn.Module:
    """Build a network that this package does not define.

    "package.module:function" is imported and run; modules are searched in the working directory
    first, as `python -m` does. The function, or the class of modules, is called with those of
    `num_classes`, `input_size` and `in_channels` that its signature names. Nothing else is called:
    no builtin, no other class, nothing of Python's own library.

    Raises:
        HessianFlowError: The import or the function fails, it needs other arguments, or its result
            is no `torch.nn.Module`.
    """
    if name.startswith("timm/"):
        create = _attribute(name, "timm", "create_model")
        return _from_library(name, create, num_classes=num_classes, in_chans=in_channels)
    if name.startswith("torchvision/"):
        get_model = _attribute(name, "torchvision.models", "get_model")
        return _from_library(name, get_model, weights=None, num_classes=num_classes)
    module, _, function = name.partition(":")
    with working_directory_first():
        factory = _factory(name, module, function)
        offered = {"num_classes": num_classes, "input_size": input_size, "in_channels": in_channels}
        arguments = _arguments(name, factory, offered)
        if module.partition(".")[0] in sys.stdlib_module_names:
            raise HessianFlowError(
                f"model {name!r}: {module!r} is of Python's own library, which makes no models"
            )
        try:
            return _checked(name, factory(**arguments))
        except HessianFlowError:
            raise
        except (Exception, SystemExit) as error:
            raise HessianFlowError(
                f"model {name!r}: calling it failed: {first_line(error)}{place_of(error)}"
            ) from error


def _factory(name: str, module: str, function: str) -> Callable[..., Any]:
    """Return the function, or the class of modules, that an import path names."""
    if module.endswith(".py") or "/" in module:
        raise HessianFlowError(
            f"model {name!r}: name the module, not its file: {Path(module).stem}:{function}"
        )
    factory = _attribute(name, module, function)
    is_model_class = inspect.isclass(factory) and issubclass(factory, nn.Module)
    if is_model_class or inspect.isfunction(factory) or isinstance(factory, partial):
        return factory
    raise HessianFlowError(
        f"model {name!r} must name a function or a class of torch.nn.Module, found a"
        f" {type(factory).__name__}"
    )


def _arguments(
    name: str, factory: Callable[..., Any], offered: Mapping[str, int]
) -> dict[str, int]:
    try:
        signature = inspect.signature(factory)
        arguments = {key: value for key, value in offered.items() if key in signature.parameters}
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise HessianFlowError(
            f"model {name!r} cannot be called with {', '.join(offered)} alone ({error}): give the"
            " others defaults"
        ) from None
    return arguments


def _from_library(name: str, create: Callable[..., Any], **options: Any) -> nn.Module:
    library, _, model = name.partition("/")
    try:
        return _checked(name, create(model, **options))
    except (RuntimeError, ValueError) as error:
        raise HessianFlowError(f"{library} cannot build {model!r}: {first_line(error)}") from error


def _attribute(name: str, module: str, attribute: str) -> Callable[..., Any]:
    value = None
    try:
        if module and attribute:
            value = getattr(import_module(module), attribute, None)
    # An import may raise anything (a broken torchvision a RuntimeError), which the user must see.
    except (Exception, SystemExit) as error:
        raise HessianFlowError(
            f"model {name!r}: importing {module!r} failed:"
            f" {first_line(error)}{_way_out(name, module, error)}"
        ) from error
    if not callable(value):
        raise HessianFlowError(
            f"model {name!r}: {module!r} has no function {attribute!r}; write it as"
            " package.module:function"
        )
    return value  # type: ignore[no-any-return]


def _way_out(name: str, module: str, error: BaseException) -> str:
    """Return advice about a module that was not found, or else the line of the error."""
    if not isinstance(error, ModuleNotFoundError):
        return place_of(error)
    library, slash, _ = name.partition("/")
    if slash:
        return f"; pip install {library}"
    if error.name == module.partition(".")[0]:
        return (
            f"; neither {os.getcwd()} nor Python's path has it: go to its folder, or add that to"
            " PYTHONPATH"
        )
    return place_of(error)


def _checked(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise HessianFlowError(
            f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model
