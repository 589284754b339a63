"""The command in a process of its own that need not import torch first: forked from a server that
has.

For what depends on the environment or ends the process. What depends on the imports, the first
signal or the end of an interpreter needs a fresh one.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from hessianflow.distributed.launch import PRELOAD

MODULES = [*PRELOAD, "hessianflow.cli", "hessianflow.build", "pytest", "trainers", "forked"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def warm() -> None:
    """Start the server, if it does not run; it keeps what it has imported, whoever asks later."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    forkserver.ensure_running()


def command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float = 300
) -> Ended:
    """Run the command in `folder`, which gets its output, with these variables set besides."""
    warm()
    variables = {**os.environ, **environment}
    process = multiprocessing.get_context("forkserver").Process(
        target=_command, args=(list(arguments), folder, variables)
    )
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{' '.join(arguments)}: not done within {seconds} s")
    out, err = (
        (folder / name).read_text("utf-8", "backslashreplace") for name in ("out.txt", "err.txt")
    )
    return Ended(process.exitcode, out, err)


def _command(arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for stream, name in ((sys.stdout, "out.txt"), (sys.stderr, "err.txt")):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    from hessianflow.cli import main

    sys.argv = ["hessianflow", *arguments]
    sys.exit(main())
