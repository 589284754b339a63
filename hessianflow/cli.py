"""The `hessianflow` command: every mistake or bad input is one line on standard error and exit status 2.

Everything heavy is imported below :func:`main`, so that an interrupt while it loads ends like any other.
"""

import os
import sys
from collections.abc import Sequence

SETTING = ("train", "plan")
"""Commands whose options are the settings of a run."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells count."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        status = _main(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say, here or at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # while training, a handler of its own ends the run in good order
        sys.stderr.write("hessianflow: interrupted\n")
        return INTERRUPTED


def _main(given: list[str]) -> int:
    from hessianflow import __version__
    from hessianflow.commands import curvature, data, plan, records, robustness, training
    from hessianflow.commands.parser import Parser
    from hessianflow.interfaces import AgreedError, HessianFlowError

    parser = Parser(prog="hessianflow", description="Train with a batch size that the curvature of the loss drives.")
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    runs = {
        name: run
        for room in (training, records, curvature, robustness, data, plan)
        for name, run in room.add(commands).items()
    }
    if given == ["--version"]:
        print(f"hessianflow {__version__}")
        return 0
    parsed = parser.parse_args(["--print_config" if word == "--print-config" else word for word in given])
    if parsed.subcommand is None:
        parser.print_help()
        return 0
    try:
        status: int = runs[parsed.subcommand](parsed[parsed.subcommand])
        return status
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(parsed.subcommand, f"{error.strerror or error}{where}")
    except AgreedError as error:
        return _fail(parsed.subcommand, str(error)) if _rank() == 0 else 2
    except HessianFlowError as error:
        return _fail(parsed.subcommand, str(error))


def _fail(command: str, message: str) -> int:
    from hessianflow.commands.settings import in_options

    where = f"rank {_rank()}: " if _rank() > 0 else ""
    line = in_options(" ".join(message.split())) if command in SETTING else " ".join(message.split())
    sys.stderr.write(f"hessianflow {command}: error: {where}{line}\n")
    return 2


def _rank() -> int:
    """Of this process among those that torchrun started; 0 for one alone."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0
