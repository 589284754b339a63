"""The `hessianflow` command, which answers a mistake with one line on standard error and status 2.

Everything heavy is imported inside functions, so that a signal while it loads has a line too.
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
    """Run the command, and return its exit status.

    The status is 0 on success, 2 after a mistake or bad input, and 130 or 143 after SIGINT or
    SIGTERM (128 plus the number of the signal, as in shells).

    Args:
        arguments: Words of the command line; None: those of this process, which then ends.
    """
    if arguments is not None:
        with signals_raised(own_process=False):
            return _run(list(arguments))
    _open_streams()
    # By default, a rank that waits for another prints stacks of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Pictures go to files, and the import of Matplotlib fails on a name it does not know.
    os.environ["MPLBACKEND"] = "agg"
    with signals_raised(own_process=True):
        status = _run(sys.argv[1:])
        ignore_signals()  # the interpreter takes a while to end, and would report one as a crash
    return status


def _run(words: list[str]) -> int:
    try:
        try:
            return _main(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone, so there is nothing more to say, here or at exit.
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        sys.stderr.write(f"hessianflow: error: standard output: {error.strerror or error}\n")
        return 2
    # While training, a handler of its own ends the run in good order.
    except Signalled as stop:
        return _stopped(stop.number)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)


def _stopped(number: signal.Signals) -> int:
    """Print the name of a signal, and return the exit status that it leads to."""
    sys.stderr.write(f"hessianflow: {WORDS[number]}\n")
    return 128 + number


def _main(words: list[str]) -> int:
    from hessianflow import __version__
    from hessianflow.commands import (
        critical_batch,
        curvature,
        data,
        plan,
        records,
        robustness,
        training,
    )
    from hessianflow.commands.parser import main_parser
    from hessianflow.commands.words import words_of
    from hessianflow.interfaces import AgreedError, HessianFlowError

    parser = main_parser(
        "hessianflow", "Train with a batch size that the curvature of the loss drives."
    )
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    functions = {
        name: function
        for module in (training, records, curvature, critical_batch, robustness, data, plan)
        for name, function in module.add(commands).items()
    }
    if words == ["--version"]:
        print(f"hessianflow {__version__}")
        return 0
    name = next((word for word in words[:1] if word in functions), "")
    try:
        arguments = _parsed(parser, words_of(parser, words))
        if arguments is None:
            parser.print_help()
            return 0
        status: int = functions[name](arguments)
        return status
    except BrokenPipeError:
        raise
    except MemoryError:
        return _fail(name, "there is not enough memory for that")
    except OSError as error:
        reason = str(error.strerror or error)
        if error.filename:
            reason += f" ({error.filename})"
        return _fail(name, reason)
    except AgreedError as error:
        if _rank() != 0:  # all ranks have the same error, which the first one prints
            return 2
        return _fail(name, str(error))
    except HessianFlowError as error:
        return _fail(name, str(error))


def _parsed(parser: Any, words: Any) -> Any:
    """Return the arguments of the command that the words name; None if they name none.

    Their attribute `given` tells which settings were given, and `methods` which methods are chosen.
    """
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
    """Print a message on one line, and return the exit status of a mistake."""
    line = " ".join(_last_cause(message).split())
    if _rank() > 0:
        line = f"rank {_rank()}: {line}"
    sys.stderr.write(f"{f'hessianflow {command}'.strip()}: error: {line}\n")
    return 2


def _last_cause(message: str) -> str:
    """Return the error itself if a process that loads data has wrapped it into its traceback."""
    if "Original Traceback (most recent call last)" not in message:
        return message
    last = message.strip().splitlines()[-1]
    name, colon, text = last.partition(": ")
    if colon and name.endswith("HessianFlowError"):
        return text
    return last


def _rank() -> int:
    """Return the rank of this process among those that torchrun started; 0 for a single one."""
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:  # the code that joins the ranks refuses it
        return 0


def _open_streams() -> None:
    """Open the standard streams that this process was started without, and let them write any name.

    A file that is opened while one of them is closed would take its number, and receive the output
    of libraries.
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
    """Discard the rest of standard output, whose writing would fail again at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file of this process
        return
