"""Run a study: `python -m experiments NAME [options]`; without a name, list the studies."""

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from experiments.runner import Study, main

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """Return the names of the studies: the folders beside this file that hold a `study.py`."""
    return sorted(path.parent.name for path in HERE.glob("*/study.py"))


def study(name: str) -> Study:
    """Import the study of this name.

    Raises:
        SystemExit: there is none; status 2, and the message names the nearest.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        way_out = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names())}"
        sys.stderr.write(f"experiments: there is no study {name[:40]!r}: {way_out}\n")
        raise SystemExit(2)
    found: Study = import_module(f"experiments.{name}.study").STUDY
    return found


def listing() -> str:
    """Return one line a study: its name, and the question that its `study.py` opens with."""
    questions = [
        ast.get_docstring(ast.parse((HERE / name / "study.py").read_text("utf-8")))
        for name in names()
    ]
    lines = [f"  {name:12} {question}" for name, question in zip(names(), questions, strict=True)]
    return "\n".join(["usage: python -m experiments NAME [--help] [options]", "", *lines])


def run(arguments: Sequence[str]) -> int:
    """Run the study that the first argument names with the others; return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    return main(study(arguments[0]), arguments[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
