"""Run directories as commands are given them."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hessianflow.interfaces import HessianFlowError


def distinct(run_dirs: Iterable[str]) -> list[Path]:
    """Return the directories, each once, and say on standard error which were repeated.

    A run named twice would pass for two seeds that agree.
    """
    found: dict[Path, Path] = {}
    for run in map(Path, run_dirs):
        if run.resolve() in found:
            sys.stderr.write(f"hessianflow: note: {run} is named more than once and counts once\n")
        found.setdefault(run.resolve(), run)
    return list(found.values())


def printable(path: str | Path) -> str:
    """Return a path as it can be printed on one line of any screen."""
    from hessianflow.runs.text import plain

    return plain(str(path))


MODEL_HELP = (
    "for a run with a model of your own: its package.module:function again, because a run directory may not run code"
)


def require_named_code(run_dir: str | Path, model: str | None) -> None:
    """Refuse to import what only a run directory names: whoever sends one could have any code run.

    Args:
        run_dir: what is no run directory at all is left to the command.
        model: what the user named; None: nothing.

    Raises:
        HessianFlowError: the run has a model by import path and `model` is not that, or it has another one.
    """
    from hessianflow.runs.documents import read_config
    from hessianflow.runs.names import CONFIG

    settings = read_config(Path(run_dir)).get("settings")
    recorded = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(recorded, str):
        return
    if model is not None and model != recorded:
        raise HessianFlowError(f"--model {model}: the model of {run_dir} is {recorded}")
    if ":" in recorded and model is None:
        raise HessianFlowError(
            f"{Path(run_dir) / CONFIG} names code that would be run: if you trust it, add --model {recorded}"
        )


def require_settings(run_dir: str | Path, command: str, instead: str) -> None:
    """Refuse a run that was made from Python, whose model and data only its maker can build.

    Args:
        run_dir: what is no run directory at all is left to the command.
        command: what needs the settings.
        instead: what a caller from Python uses.

    Raises:
        HessianFlowError: config.json holds no settings.
    """
    from hessianflow.runs.documents import read_config
    from hessianflow.runs.names import CONFIG

    path = Path(run_dir) / CONFIG
    if path.is_file() and "settings" not in read_config(Path(run_dir)):
        raise HessianFlowError(
            f"{path} holds no settings: `hessianflow {command}` needs a run of `hessianflow train`; with one made from "
            f"Python, call {instead}"
        )


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the place, while active: a full disk names none.

    Raises:
        HessianFlowError: as said.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HessianFlowError(f"cannot write to {place}: {error.strerror or error}") from None
