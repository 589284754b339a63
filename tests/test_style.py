"""The text of the package, counted: what makes lines hard to read is held below a limit.

python tests/test_style.py                 # the figures beside their limits
python tests/test_style.py --where packed  # the lines that one of the figures counts
"""

import ast
import re
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hessianflow"
WIDTH, SCREEN, FEW_WORDS = 100, 50, 3


LIMITS = {
    "conditional expressions per 1,000 lines": 8,
    "packed assignments per 1,000 lines": 3,
    "docstrings of three words or fewer": 0,
    "lines over 100": 0,
    "functions over 50 lines": 0,
    "lines of the median function": 8,
}
PRAGMA = re.compile(r"  # (type: ignore|noqa).*")
Place = tuple[Path, int]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def nodes(folder: Path) -> list[tuple[Path, ast.AST]]:
    """Return every node of every module below a folder, with the file that it stands in."""
    return [
        (path, node)
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]


def conditional(folder: Path) -> list[Place]:
    """Return where `a if b else c` stands."""
    return [(path, node.lineno) for path, node in nodes(folder) if isinstance(node, ast.IfExp)]


def packed(folder: Path) -> list[Place]:
    """Return where `a, b = x, y` stands: a tuple written out on both sides."""
    return [
        (path, node.lineno)
        for path, node in nodes(folder)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]


def short(folder: Path) -> list[Place]:
    """Return where a docstring of three words or fewer stands."""
    found = []
    for path, node in nodes(folder):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            text = ast.get_docstring(node)
            if text is not None and len(text.split()) <= FEW_WORDS:
                found.append((path, getattr(node, "lineno", 1)))
    return found


def wide(folder: Path) -> list[Place]:
    """Return the lines that are too long, not counting what stands at their end for a tool."""
    return [
        (path, number)
        for path in sorted(folder.rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(PRAGMA.sub("", line)) > WIDTH
    ]


def length(function: Function) -> int:
    """Return the lines of a function from `def` to its end, without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    text = function.body[0]
    return lines - ((text.end_lineno or text.lineno) - text.lineno + 1)


def lengths(folder: Path) -> dict[Place, int]:
    """Return the length of every function by where it stands."""
    return {
        (path, node.lineno): length(node)
        for path, node in nodes(folder)
        if isinstance(node, Function)
    }


def long(folder: Path) -> list[Place]:
    """Return the functions that are longer than a screen."""
    return [place for place, lines in lengths(folder).items() if lines > SCREEN]


@cache
def figures(folder: Path) -> dict[str, float]:
    """Return what :data:`LIMITS` limits, for the modules below a folder."""
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py"))
    return {
        "conditional expressions per 1,000 lines": 1000 * len(conditional(folder)) / lines,
        "packed assignments per 1,000 lines": 1000 * len(packed(folder)) / lines,
        "docstrings of three words or fewer": len(short(folder)),
        "lines over 100": len(wide(folder)),
        "functions over 50 lines": len(long(folder)),
        "lines of the median function": statistics.median(lengths(folder).values()),
    }


@pytest.mark.parametrize("name", LIMITS)
def test_the_package_keeps_its_limits(name: str) -> None:
    assert figures(PACKAGE)[name] <= LIMITS[name]


def test_each_figure_counts_what_it_says(tmp_path: Path) -> None:
    body = "".join(f"    x = {number}\n" for number in range(51))
    (tmp_path / "module.py").write_text(
        '"""Too short."""\n\n\n'
        f'def long(a, b):\n    """Count to fifty, one number a line."""\n{body}\n\n'
        "def other(a, b):\n    (a, b), c = (b, a), 1 if a else 2\n    a, b = sorted([a, b])\n"
        f"    return {'a + ' * 30}b\n"
    )
    lines = 1 + 2 + 2 + 51 + 2 + 4
    assert figures(tmp_path) == {
        "conditional expressions per 1,000 lines": 1000 / lines,
        "packed assignments per 1,000 lines": 1000 / lines,
        "docstrings of three words or fewer": 1,
        "lines over 100": 1,
        "functions over 50 lines": 1,
        "lines of the median function": (52 + 4) / 2,
    }


def main(arguments: Sequence[str]) -> int:
    """Print the figures, or with `--where NAME` the lines that one of them counts."""
    if arguments[:1] == ["--where"]:
        counts = {"conditional": conditional, "packed": packed, "short": short}
        counts |= {"wide": wide, "long": long}
        for path, number in counts[arguments[1]](PACKAGE):
            print(f"{path.relative_to(PACKAGE.parent)}:{number}")
        return 0
    print(f"{'':42}{'now':>8}{'limit':>8}")
    for name, figure in figures(PACKAGE).items():
        print(f"{name:42}{figure:8.1f}{LIMITS[name]:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
