"""The import of a user's own class or function by `package.module:name`.

The import runs code, so only the user may name it.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hessianflow.interfaces import HessianFlowError


@contextmanager
def working_directory_first() -> Iterator[None]:
    """Look for modules in the working directory first while active, and last afterwards.

    So the later imports of an object succeed too, and hide nothing that is installed.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)


def attribute(path: str, where: str) -> Any:
    """Return the class or function at an import path `package.module:name`.

    Raises:
        HessianFlowError: The module cannot be imported, or has no class or function of that name;
            the error begins with `where`, the option that names it.
    """
    module, _, name = path.partition(":")
    if module.endswith(".py") or "/" in module:
        raise HessianFlowError(
            f"{where}: name the module, not its file: {Path(module).stem}:{name}"
        )
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise HessianFlowError(f"{where}: {module!r} is of Python's own library, which has none")
    imported = None
    with working_directory_first():
        try:
            if module and name:
                imported = getattr(import_module(module), name, None)
        # The user is told whatever the import of the user's own code raises.
        except (Exception, SystemExit) as error:
            raise HessianFlowError(
                f"{where}: importing {module!r} failed: {first_line(error)}"
                f"{_way_out(module, error)}"
            ) from error
    if not (inspect.isclass(imported) or inspect.isfunction(imported)):
        raise HessianFlowError(
            f"{where}: {module!r} has no class or function {name!r}; write it as"
            " package.module:Class"
        )
    return imported


def _way_out(module: str, error: BaseException) -> str:
    """Return advice on a module that was not found, or the place that the error comes from."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return (
            f"; neither {os.getcwd()} nor Python's path has it: go to its folder, or add that to"
            " PYTHONPATH"
        )
    return place_of(error)


def place_of(error: BaseException) -> str:
    """Return the file and line of the user's code that an error came from; empty if unknown."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(os.getcwd()):
            return f" ({Path(frame.filename).name} line {frame.lineno})"
    return ""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    message = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {message[0]}"
