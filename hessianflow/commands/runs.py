"""Run directories as arguments of commands."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessianflow.config import CHOSEN
from hessianflow.interfaces import HessianFlowError
from hessianflow.upgrade import upgrade

if TYPE_CHECKING:
    from hessianflow.parts import Parts


def distinct(run_dirs: Iterable[str]) -> list[Path]:
    """Return each of the directories once, and note on standard error which were repeated.

    A run that is named twice would look like two seeds that agree.
    """
    runs: dict[Path, Path] = {}
    for run in map(Path, run_dirs):
        if run.resolve() in runs:
            sys.stderr.write(f"hessianflow: note: {run} is named more than once and counts once\n")
        runs.setdefault(run.resolve(), run)
    return list(runs.values())


def printable(path: str | Path) -> str:
    """Return a path as text that prints on one line of any screen."""
    from hessianflow.runs.text import plain

    return plain(str(path))


def add_named_code(parser: Any) -> None:
    """Add the options that name the code of a run again for :func:`require_named_code`."""
    about = "for a run with a model of your own: its package.module:function again, because code"
    parser.add_open("--model", str | None, f"{about} that only a run directory names is not run")
    add_code(parser)


def add_code(parser: Any) -> None:
    """Add the option that names the methods of a run again for :func:`require_named_code`."""
    about = "for a run with methods of your own: their package.module:Class again"
    parser.add_open("--code", str | None, f"{about}, separated by commas")


def load_run(arguments: Any, command: str, instead: str) -> tuple[Path, "Parts"]:
    """Return the run directory and the parts of a run, or of a checkpoint, that may be loaded.

    Arguments and errors are those of :func:`require_settings` and :func:`require_named_code`.
    """
    from hessianflow.parts import find_checkpoint, load_parts

    run_dir = find_checkpoint(arguments.run)[0]
    require_settings(run_dir, command, instead)
    require_named_code(run_dir, arguments)
    return run_dir, load_parts(arguments.run)[1]


def require_named_code(run_dir: str | Path, arguments: Any, *, builds_model: bool = True) -> None:
    """Refuse to import code that only a run directory names, because its sender chose that code.

    Nor may the user name another model than that of the run. Any path that is no run directory
    passes, and the command refuses it later. The options are those of :func:`add_named_code`.
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
    if builds_model and isinstance(recorded, str) and ":" in recorded and model is None:
        raise HessianFlowError(
            f"{where} names code that would be run: if you trust it, add --model {recorded}"
        )
    trusted = (arguments.code or "").split(",")
    # Options of older releases are imported under their names of today.
    methods = [upgrade(settings).get(kind) for kind in CHOSEN]
    own = [path for path in _paths(methods) if path not in trusted]
    if own:
        raise HessianFlowError(
            f"{where} names code that would be run: if you trust it, add --code {','.join(own)}"
        )


def _paths(value: Any) -> list[str]:
    """Return every import path in recorded methods, however deep: each may name a class."""
    if isinstance(value, str) and ":" in value:
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [path for part in value for path in _paths(part)]
    return []


def require_settings(run_dir: str | Path, command: str, instead: str) -> None:
    """Refuse a run that was made from Python, whose model and data only its own code can build.

    The error names the function to call `instead`. Any path that is no run directory passes, and
    the command refuses it later.
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
def writing_to(folder: str | Path) -> Iterator[None]:
    """Raise failures to write as errors that name the folder while active."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HessianFlowError(f"cannot write to {folder}: {error.strerror or error}") from None
