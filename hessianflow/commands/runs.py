"""Run directories as commands are given them."""

import sys
from collections.abc import Iterable
from pathlib import Path

from hessianflow.interfaces import HessianFlowError


def distinct(run_dirs: Iterable[str]) -> list[Path]:
    """The directories, each once: a run named twice would pass for two seeds that agree. Says so on standard error."""
    found: dict[Path, Path] = {}
    for run in map(Path, run_dirs):
        if run.resolve() in found:
            sys.stderr.write(f"hessianflow: note: {run} is named more than once and counts once\n")
        found.setdefault(run.resolve(), run)
    return list(found.values())


def shown(path: str | Path) -> str:
    """Return a path as it can be printed on one line of any screen."""
    from hessianflow.runs.text import plain

    return plain(str(path))


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
