"""Imports what a user names by `package.module:name`: code that is run, so only the user may name
it."""

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
    """While active, modules are looked for in the working directory first; afterwards last, if
    nowhere else.

    What an object imports when it is first used is found then, too, and hides nothing that is
    installed.
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

    Args:
        path: the import path.
        where: the option that names it, for errors.

    Raises:
        HessianFlowError: the module cannot be imported, or has no class or function of that name.
    """
    module, _, name = path.partition(":")
    if module.endswith(".py") or "/" in module:
        raise HessianFlowError(
            f"{where}: name the module, not its file: {Path(module).stem}:{name}"
        )
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise HessianFlowError(f"{where}: {module!r} is of Python's own library, which has none")
    with working_directory_first():
        try:
            found = getattr(import_module(module), name, None) if module and name else None
        # Whatever the import of the user's own code raises is the answer to the user.
        except (Exception, SystemExit) as error:
            raise HessianFlowError(
                f"{where}: importing {module!r} failed: {first_line(error)}"
                f"{_way_out(module, error)}"
            ) from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise HessianFlowError(
            f"{where}: {module!r} has no class or function {name!r}; write it as"
            " package.module:Class"
        )
    return found


def _way_out(module: str, error: BaseException) -> str:
    """Return what to do about a module that was not found, or where the error comes from."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return (
            f"; neither {os.getcwd()} nor Python's path has it: go to its folder, or add that to"
            " PYTHONPATH"
        )
    return place_of(error)


def place_of(error: BaseException) -> str:
    """Return the file and the line of the user's code that an error came from; empty where that is
    unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(os.getcwd())]
    return f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    message = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {message[0]}"
