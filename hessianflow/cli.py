"""The `hessianflow` command: every mistake or bad input is one line on standard error and exit
status 2.

Everything heavy is imported below :func:`main`, so that a signal while it loads ends like any
other.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from hessianflow.commands.signals import WORDS, Signalled, ignore_signals, signals_raised

SETTING = ("train", "plan", "replay")
"""Commands whose options are the settings of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    0: done. 2: a mistake or bad input. 130, 143: stopped by SIGINT or SIGTERM (128 + its number, as
    shells count).

    Args:
        arguments: the words of the command line; None: those of this process, which ends with the
            command.
    """
    if arguments is not None:
        with signals_raised(own_process=False):
            return _run(list(arguments))
    _open_streams()
    # else a rank that waits for another prints stacks of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # pictures go to files; a name that Matplotlib does not know would end all
    os.environ["MPLBACKEND"] = "agg"
    with signals_raised(own_process=True):
        status = _run(sys.argv[1:])
        ignore_signals()  # the interpreter takes a while to end, and would report one as a crash
    return status


def _run(given: list[str]) -> int:
    try:
        try:
            return _main(given)
        finally:
            sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # the reader of our output has gone: nothing is left to say, here or at exit
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        sys.stderr.write(f"hessianflow: error: standard output: {error.strerror or error}\n")
        return 2
    except (
        KeyboardInterrupt
    ) as stop:  # while training, a handler of its own ends the run in good order
        number = stop.number if isinstance(stop, Signalled) else signal.SIGINT
        sys.stderr.write(f"hessianflow: {WORDS[number]}\n")
        return 128 + number


def _main(given: list[str]) -> int:
    from hessianflow import __version__
    from hessianflow.commands import curvature, data, plan, records, robustness, training
    from hessianflow.commands.parser import main_parser
    from hessianflow.commands.words import words_of
    from hessianflow.interfaces import AgreedError, HessianFlowError

    parser = main_parser(
        "hessianflow", "Train with a batch size that the curvature of the loss drives."
    )
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    runs = {
        name: run
        for room in (training, records, curvature, robustness, data, plan)
        for name, run in room.add(commands).items()
    }
    if given == ["--version"]:
        print(f"hessianflow {__version__}")
        return 0
    name = given[0] if given and given[0] in runs else ""
    try:
        arguments = _parsed(parser, words_of(parser, given))
        if arguments is None:
            parser.print_help()
            return 0
        status: int = runs[name](arguments)
        return status
    except BrokenPipeError:
        raise
    except MemoryError:
        return _fail(name, "there is not enough memory for that")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(name, f"{error.strerror or error}{where}")
    except AgreedError as error:
        return _fail(name, str(error)) if _rank() == 0 else 2
    except HessianFlowError as error:
        return _fail(name, str(error))


def _parsed(parser: Any, words: Any) -> Any:
    """Return the arguments of the command named in the words, None where none is; `given` and
    `files` say what was given."""
    from hessianflow.commands.parser import INSIDE
    from hessianflow.commands.settings import Given

    if words.files:
        parser.announce(
            f"in {', '.join(dict.fromkeys(file for _, file in words.files.values()))}: "
        )
        parser.parse_args([*words.command, *words.from_files])
        parser.announce("")
    parsed = parser.parse_args(words.all)
    if parsed.subcommand is None:
        return None
    arguments = parsed[parsed.subcommand]
    if parsed.subcommand in SETTING:
        typed = parser.parse_args([*words.command, *words.typed], defaults=False)[parsed.subcommand]
        named = {name for name, value in typed.items() if value is not None or INSIDE in name}
        settings = {name.replace(INSIDE, ".") for name in parser.current.settings & named}
        arguments.given = Given(settings, frozenset(words.files), tuple(words.notes))
        arguments.methods = parser.current.methods
    return arguments


def _fail(command: str, message: str) -> int:
    where = f"rank {_rank()}: " if _rank() > 0 else ""
    line = " ".join(_last_cause(message).split())
    sys.stderr.write(f"{f'hessianflow {command}'.strip()}: error: {where}{line}\n")
    return 2


def _last_cause(message: str) -> str:
    """Return the error itself, where a process that loads data has wrapped it into its
    traceback."""
    if "Original Traceback (most recent call last)" not in message:
        return message
    last = message.strip().splitlines()[-1]
    name, colon, text = last.partition(": ")
    return text if colon and name.endswith("HessianFlowError") else last


def _rank() -> int:
    """Return the rank of this process among those that torchrun started; 0 for one alone."""
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:  # what is wrong with it is said where ranks meet
        return 0


def _open_streams() -> None:
    """Give this process the three standard streams, where it was started without, and let them
    write any name.

    A file that is opened while one of them is closed would take its number, and what libraries
    print would go there.
    """
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        os.set_inheritable(handle, True)
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Send what is still to be written to standard output nowhere: at exit it would fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file of this process
        return
