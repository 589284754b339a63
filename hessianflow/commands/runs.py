"""Run directories as arguments of commands."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hessianflow.config import CHOSEN
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


def add_named_code(parser: Any) -> None:
    """Add the options that name the code of a run again, as :func:`require_named_code` wants it."""
    parser.add(
        "--model",
        type=str | None,
        default=None,
        help=(
            "for a run with a model of your own: its package.module:function again, because a run"
            " directory may not run code"
        ),
    )
    parser.add(
        "--code",
        type=str | None,
        default=None,
        help=(
            "for a run with a method of your own: its package.module:Class again, several with"
            " commas between them"
        ),
    )


def require_named_code(run_dir: str | Path, arguments: Any) -> None:
    """Refuse to import code that only a run directory names: its sender could have any code run.

    Args:
        run_dir: the run directory; a path that is none passes, for the command to refuse.
        arguments: those of a command with the options of :func:`add_named_code`.

    Raises:
        HessianFlowError: the run's model or one of its methods is an import path that the user did
            not name, or the model named is not that of the run.
    """
    from hessianflow.runs.documents import read_config
    from hessianflow.runs.names import CONFIG

    settings = read_config(Path(run_dir)).get("settings")
    if not isinstance(settings, dict):
        return
    recorded = settings.get("model")
    model = arguments.model
    if isinstance(recorded, str) and model is not None and model != recorded:
        raise HessianFlowError(f"--model {model}: the model of {run_dir} is {recorded}")
    where = Path(run_dir) / CONFIG
    if isinstance(recorded, str) and ":" in recorded and model is None:
        raise HessianFlowError(
            f"{where} names code that would be run: if you trust it, add --model {recorded}"
        )
    trusted = (arguments.code or "").split(",")
    own = [path for path in _paths(settings) if path not in (recorded, *trusted)]
    if own:
        raise HessianFlowError(
            f"{where} names code that would be run: if you trust it, add --code {','.join(own)}"
        )


def _paths(settings: Any) -> list[str]:
    """Return every name in recorded settings that is an import path."""
    if not isinstance(settings, dict):
        return []
    found = [settings[key] for key in ("name", *CHOSEN) if isinstance(settings.get(key), str)]
    inner = [path for value in settings.values() for path in _paths(value)]
    return [path for path in found if ":" in path] + inner


def require_settings(run_dir: str | Path, command: str, instead: str) -> None:
    """Refuse a run that was made from Python: only the code that made it can build its model and
    data.

    Args:
        run_dir: the run directory; a path that is none passes, for the command to refuse.
        command: the command that needs the settings.
        instead: the function to call from Python instead.

    Raises:
        HessianFlowError: config.json holds no settings.
    """
    from hessianflow.runs.documents import read_config
    from hessianflow.runs.names import CONFIG

    path = Path(run_dir) / CONFIG
    if path.is_file() and "settings" not in read_config(Path(run_dir)):
        raise HessianFlowError(
            f"{path} holds no settings: `hessianflow {command}` needs a run of `hessianflow train`;"
            f" with one made from Python, call {instead}"
        )


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the place, while active: a full disk names
    none.

    Raises:
        HessianFlowError: as said.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HessianFlowError(f"cannot write to {place}: {error.strerror or error}") from None
