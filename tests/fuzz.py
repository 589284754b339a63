"""Runs the command on hostile input, hundreds of times in one process, and says what went wrong.

A case passes if the command ends with status 0, or with status 2 and exactly one line on standard
error, without an exception and within its time. A test makes cases, runs them, and asserts that
none failed:

    tally = run_all([Case("a batch of 0", ["train", "--batch-size", "0"])], tmp_path, seconds=20)
    assert not tally.failures, report(tally)

:data:`VALUES` and :func:`torn` are stocks of what files and options may hold instead of what is
meant.
"""

import contextlib
import faulthandler
import io
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hessianflow.cli import main

VALUES: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**53, 2**63, 10**30, 10**400, -(10**400)),
    *(
        0.0,
        -0.5,
        0.5,
        1.5,
        1e-320,
        1e99,
        1e101,
        1e308,
        -1e308,
        float("inf"),
        float("-inf"),
        float("nan"),
    ),
    *(
        "",
        " ",
        "x",
        "5",
        "nan",
        "auto",
        "none",
        "$x^$",
        r"$\frac{a}$",
        "_a",
        "a\nb",
        "a\0b",
        "a\udcffb",
        "\x1b[31m",
    ),
    *(
        "\u202e\u2028",
        "<b>&lt;|`",
        "=1+1",
        "../../x",
        "/dev/null",
        "builtins:input",
        "x" * 3000,
        "日本\U0001f600",
    ),
    *(
        [],
        [1],
        ["x"],
        [None],
        [[1]],
        [1, 2, 3],
        [float("nan")],
        {},
        {"a": 1},
        {"value": {}},
        {"5": [None]},
    ),
)
"""Values of every kind that JSON can hold, and some that it cannot."""

SHARE = float(os.environ.get("FUZZ_SHARE", "0.4"))
"""Of the cases that tests can draw: 0.4 are more than a thousand in all, FUZZ_SHARE=1 draws every
one."""


def some(count: int) -> int:
    """Return how many of `count` cases to draw, at least one."""
    return max(1, round(SHARE * count))


Prepare = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One command on one input.

    Attributes:
        name: says what is odd about it.
        argv: the command's arguments; "{}" in them stands for the folder of the case.
        prepare: makes the files, given the folder of the case.
        statuses: in which the command may end.
        keeps: files below the folder that must be as before when the command refuses.
    """

    name: str
    argv: Sequence[str]
    prepare: Prepare = lambda _folder: None
    statuses: Sequence[int] = (0, 2)
    keeps: Sequence[str] = ()


@dataclass
class Tally:
    """How many cases ended how."""

    counts: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


class OverTime(BaseException):
    """The time of a case is up; no handler of ordinary errors sees it."""


def run_all(cases: Sequence[Case], folder: Path, *, seconds: float) -> Tally:
    """Run cases, each in a folder of its own below `folder` that is removed if it passes.

    Args:
        cases: what to run.
        folder: exists.
        seconds: that a case may take.
    """
    tally = Tally()
    with _quiet():
        for number, case in enumerate(cases):
            place = folder / f"case{number}"
            place.mkdir()
            began = time.monotonic()
            status, trouble = _outcome(case, place, seconds)
            tally.counts[status] = tally.counts.get(status, 0) + 1
            tally.slowest = max(tally.slowest, (time.monotonic() - began, case.name))
            if trouble:
                tally.failures.append(f"{case.name} | {' '.join(case.argv)}: {trouble}")
            else:
                _remove(place)
    return tally


def _outcome(case: Case, place: Path, seconds: float) -> tuple[int, str]:
    """The status of a case, -1 if it has none, and what is wrong with it."""
    case.prepare(place)
    before = _contents(place, case.keeps)
    with contextlib.chdir(place) if hasattr(contextlib, "chdir") else _in_folder(place):
        status, error = run([word.replace("{}", str(place)) for word in case.argv], seconds)
    if status is None:
        return -1, error
    lines = error.count("\n")
    if status not in case.statuses:
        return status, f"status {status}: {error[-300:]}"
    if "Traceback" in error:
        return status, f"a traceback: {error[-300:]}"
    if status == 2 and lines != 1:
        return status, f"{lines} lines on standard error: {error[:600]!r}"
    if status == 2 and _contents(place, case.keeps) != before:
        return status, "a refusal changed files"
    return status, ""


def run(argv: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status and standard error of a command in this process; None and what happened where it
    has none."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)

    def said() -> str:
        return err.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]

    try:
        with _time_limit(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(list(argv)), said()
    except SystemExit as stop:
        return (stop.code if isinstance(stop.code, int) else 1), said()
    except OverTime:
        return None, f"over {seconds} s"
    except BaseException as error:  # whatever escapes is what we look for
        last = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"


def torn(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The content of a file after an accident, and what happened."""
    place = chance.randrange(len(content) + 1)
    kinds: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:place],
        "beginning lost": lambda: content[place:],
        "flipped bits": lambda: bytes(
            b ^ (chance.random() < 0.01) * chance.randrange(256) for b in content
        ),
        "zeros inside": lambda: content[:place] + b"\0" * 300 + content[place:],
        "zeros at the end": lambda: content + b"\0" * 5000,
        "noise inside": lambda: content[:place] + chance.randbytes(50) + content[place:],
        "noise": lambda: chance.randbytes(2000),
        "nothing": lambda: b"",
        "twice": lambda: content + content,
        "line ends of Windows": lambda: content.replace(b"\n", b"\r\n"),
        "a byte-order mark": lambda: b"\xef\xbb\xbf" + content,
        "UTF-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
        "deep": lambda: b"[" * 200_000,
        "deep objects": lambda: b'{"a":' * 100_000,
        "long": lambda: b'"' + b"x" * 11_000_000 + b'"\n' + content,
        "a long number": lambda: b"9" * 100_000 + b"\n" + content,
    }
    kind = chance.choice(sorted(kinds))
    return kind, kinds[kind]()


def _contents(place: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in names if (place / name).is_file()}


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def over(_number: int, _frame: Any) -> None:
        raise OverTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # for what does not even see a signal
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings as the command shows them, each to the standard error of its case."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@contextlib.contextmanager
def _in_folder(place: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _remove(place: Path) -> None:
    import shutil

    shutil.rmtree(place, ignore_errors=True)


def report(tally: Tally) -> str:
    """What a test says when cases failed."""
    shown = "\n".join(tally.failures[:40])
    return (
        f"{len(tally.failures)} of {sum(tally.counts.values())} cases failed"
        f" ({tally.counts}):\n{shown}"
    )


if sys.platform == "win32":
    raise ImportError("the time limit of a case needs SIGALRM")
